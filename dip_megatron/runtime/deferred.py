"""The weight gradients that a split backward leaves for later: what B stores and W computes.

A stage whose plan has a B and a W runs with a :class:`WeightGradients` of its own. Its layers save what their weight
gradients need there instead of computing them; W works through it. Several stages may stand between their B and their
W, in any order, because each has its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch


class WeightGradients:
    """The weight gradients of one stage, each a function that computes and accumulates it."""

    __slots__ = ("_work", "anchor")

    def __init__(self) -> None:
        self._work: deque[Callable[[], None]] = deque()
        self.anchor = torch.empty(0, requires_grad=True)
        """Input of functions whose other inputs may need no gradient, so that autograd visits them at all."""

    def add(self, work: Callable[[], None]) -> None:
        """Leave ``work`` for :meth:`compute`; it holds the tensors it needs."""
        self._work.append(work)

    def compute(self) -> None:
        """W: compute all of them, in the order in which B left them, and free what each held."""
        while self._work:
            self._work.popleft()()


class AtOnce(WeightGradients):
    """For layers that can defer weight gradients in a stage that doesn't: each is computed when it is added."""

    __slots__ = ()

    def add(self, work: Callable[[], None]) -> None:
        """Compute it."""
        work()


def accumulate(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    """Add a weight gradient as autograd and Megatron's DDP do: to ``main_grad`` where there is one, else to ``grad``.

    DDP's backward hook does the same and then registers the parameter as ready for reduction; under a plan reductions
    start explicitly (see :mod:`dip_megatron.megatron.gradients`), so there is nothing to register.
    """
    main_grad = getattr(parameter, "main_grad", None)
    with torch.no_grad():
        if main_grad is not None:
            main_grad.add_(gradient)
        elif parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.add_(gradient)


class _Slot:
    """The gradient of a cut output, between B and W."""

    __slots__ = ("gradient",)

    def __init__(self) -> None:
        self.gradient: torch.Tensor | None = None


class _After(torch.autograd.Function):
    """What follows a cut: the same values, and B ends here with their gradient kept."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, output: list[torch.Tensor], work: Callable[[], None],
                slot: _Slot, store: WeightGradients) -> torch.Tensor:  # fmt: skip
        ctx.work, ctx.slot, ctx.store = work, slot, store
        return output[0].data

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        ctx.slot.gradient = gradient
        ctx.store.add(ctx.work)
        ctx.work = ctx.slot = ctx.store = None
        return None, None, None, None, None


class _Before(torch.autograd.Function):
    """What precedes a cut: an empty tensor, from which W enters the graph with the kept gradient."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, slot: _Slot) -> torch.Tensor:
        ctx.slot = slot
        return output.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:  # type: ignore[override]
        gradient, ctx.slot.gradient = ctx.slot.gradient, None
        return gradient, None


def cut(output: torch.Tensor, store: WeightGradients) -> torch.Tensor:
    """``output``, cut off from the graph that computed it: that part's backward is left for W.

    For layers that have weights but no input that needs a gradient (token tables, patch embeddings). W runs autograd
    through them, hooks of the parameters included. Until W their saved tensors and the output's gradient are held.
    """
    if not output.requires_grad:
        return output
    slot = _Slot()
    entrance = _Before.apply(output, slot)

    def work() -> None:
        torch.autograd.backward(entrance, entrance.new_empty(0))

    return _After.apply(store.anchor, [output], work, slot, store)
