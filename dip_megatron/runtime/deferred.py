"""The weight gradients that a split backward leaves for later: what B stores and W computes.

A stage whose plan has a B and a W runs with a :class:`WeightGradients` of its own. Its layers save what their weight
gradients need there instead of computing them; W works through it. Several stages may stand between their B and their
W, in any order, because each has its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..compat.tensors import storage_id
from .offload import HostCopy, OffloadedActivations


class _Gathering:
    """All ranks' parts along the first dimension, under way."""

    __slots__ = ("_handle", "_part", "_whole")

    def __init__(self, part: torch.Tensor, group: Any):
        self._part = part  # not to be freed before it has been sent
        self._whole = part.new_empty(part.size(0) * group.size(), *part.shape[1:])
        self._handle: Any = torch.distributed.all_gather_into_tensor(self._whole, part, group=group, async_op=True)

    def whole(self) -> torch.Tensor:
        """Wait for it."""
        self._handle.wait()
        return self._whole


@dataclass(slots=True)
class _Work:
    """``run`` computes a weight gradient of its operands, an input and that output's gradient; ``gathered`` are the
    number of one that is this rank's part and the group to gather it over before. Without operands it holds its own."""

    run: Callable[..., None]
    operands: list[torch.Tensor | HostCopy] = field(default_factory=list)
    gathered: tuple[int, Any] | None = None

    def fetch(self, stream: Any) -> None:
        """Begin to bring back what is in host memory."""
        for x in self.operands:
            if isinstance(x, HostCopy):
                x.fetch(stream)

    def taken(self, stream: Any) -> list[torch.Tensor]:
        """All operands on the device, and none of them held here any longer."""
        operands, self.operands = self.operands, []
        return [x.take(stream) if isinstance(x, HostCopy) else x for x in operands]


def own_part(whole: torch.Tensor, group: Any) -> torch.Tensor:
    """A copy of this rank's part along the first dimension of what all ranks of ``group`` have alike."""
    rows = whole.size(0) // group.size()
    return whole.narrow(0, group.rank() * rows, rows).clone()


class WeightGradients:
    """The weight gradients of one stage, each a function that computes and accumulates it.

    Under sequence parallelism a matrix that a weight gradient needs (a column-parallel linear's input, the gradient of
    a row-parallel one's output) waits as this rank's part of it, and is gathered in W: while the product before it is
    computed, so that only the first gather of a stage is waited for. What waits in host memory (:meth:`hosting`) comes
    back while the two products before it are computed.
    """

    __slots__ = ("_stream", "_work", "anchor")
    waits = True
    """Whether what is added stays for a while: else there is nothing to gain by holding parts."""

    def __init__(self) -> None:
        self._work: deque[_Work] = deque()
        self._stream: Any = None
        self.anchor = torch.empty(0, requires_grad=True)
        """Input of functions whose other inputs may need no gradient, so that autograd visits them at all."""

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        copies = [x for work in self._work for x in work.operands if isinstance(x, HostCopy)]
        return sum(x.host.untyped_storage().nbytes() for x in copies)

    def add(self, work: Callable[[], None]) -> None:
        """Leave ``work`` for :meth:`compute`; it holds the tensors it needs."""
        self._work.append(_Work(work))

    def add_product(
        self, work: Callable[[torch.Tensor, torch.Tensor], None], input_: torch.Tensor, gradient: torch.Tensor,
        gathered: tuple[int, Any] | None = None,
    ) -> None:  # fmt: skip
        """Leave ``work(input_, gradient)`` for :meth:`compute`. ``gathered``: of which of the two (0: the input, 1:
        the output's gradient) this is the rank's part along the first dimension, and the group of those whose parts
        ``work`` is to be given too."""
        self._work.append(_Work(work, [input_, gradient], gathered))

    def hosting(self, offloaded: OffloadedActivations) -> WeightGradients:
        """These gradients for layers whose inputs of weight gradients go to host memory until W, by the stream of
        their stage's other copies; what layers share stays."""
        self._stream = offloaded.stream
        return _Hosting(self, offloaded)

    def prefetch(self) -> None:
        """Begin to bring back what the first of them need."""
        for work in list(self._work)[:2]:
            work.fetch(self._stream)

    def compute(self) -> None:
        """W: compute all of them, in the order in which B left them, and free what each held."""
        self.prefetch()
        ahead = self._gather_next()
        while self._work:
            work = self._work.popleft()
            if len(self._work) > 1:
                self._work[1].fetch(self._stream)
            if ahead is None or work.gathered is None:
                work.run(*work.taken(self._stream))
                continue
            whole, ahead = ahead.whole(), self._gather_next()
            operands = work.taken(self._stream)
            operands[work.gathered[0]] = whole
            work.run(*operands)
            del whole, operands  # not to be there beside the next one's

    def _gather_next(self) -> _Gathering | None:
        """Start to gather for the first of those left that needs it."""
        for work in self._work:
            if work.gathered is not None:
                place, group = work.gathered
                part = work.operands[place]
                if isinstance(part, HostCopy):
                    part = work.operands[place] = part.take(self._stream)
                return _Gathering(part, group)
        return None


class _Hosting(WeightGradients):
    """Adds to another's, with inputs in host memory."""

    __slots__ = ("_offloaded",)

    def __init__(self, of: WeightGradients, offloaded: OffloadedActivations):
        self._work, self._stream, self.anchor, self._offloaded = of._work, of._stream, of.anchor, offloaded

    def add_product(
        self, work: Callable[[torch.Tensor, torch.Tensor], None], input_: torch.Tensor, gradient: torch.Tensor,
        gathered: tuple[int, Any] | None = None,
    ) -> None:  # fmt: skip
        shared = storage_id(input_.untyped_storage()) in self._offloaded.shared
        own = input_.is_contiguous() and not shared
        held = HostCopy(input_, self._stream, uses=1) if own else input_
        self._work.append(_Work(work, [held, gradient], gathered))


class AtOnce(WeightGradients):
    """For layers that can defer weight gradients in a stage that doesn't: each is computed when it is added."""

    __slots__ = ()
    waits = False

    def add(self, work: Callable[[], None]) -> None:
        """Compute it."""
        work()

    def add_product(
        self, work: Callable[[torch.Tensor, torch.Tensor], None], input_: torch.Tensor, gradient: torch.Tensor,
        gathered: tuple[int, Any] | None = None,
    ) -> None:  # fmt: skip
        """Gather, and compute it."""
        operands = [input_, gradient]
        if gathered is not None:
            place, group = gathered
            operands[place] = _Gathering(operands[place], group).whole()
        work(*operands)

    def hosting(self, offloaded: OffloadedActivations) -> WeightGradients:
        """Nothing waits."""
        return self


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


class Slot:
    """Where the gradient of a tensor arrives that starts a graph; the tensor itself is not held."""

    __slots__ = ("_like", "gradient")

    def __init__(self, tensor: torch.Tensor):
        self._like = (tensor.shape, tensor.dtype, tensor.device)
        self.gradient: torch.Tensor | None = None

    def take(self) -> torch.Tensor:
        """The gradient, zeros if nothing followed from the tensor; it is held here no longer."""
        gradient, self.gradient = self.gradient, None
        if gradient is None:
            shape, dtype, device = self._like
            return torch.zeros(shape, dtype=dtype, device=device)
        return gradient


class _Start(torch.autograd.Function):
    """Same values, a new graph; the gradient goes to a slot, and ``then`` is called."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, values: list[torch.Tensor], slot: Slot,
                then: Callable[[], None] | None) -> torch.Tensor:  # fmt: skip
        ctx.slot, ctx.then = slot, then
        return values[0].data

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        ctx.slot.gradient = gradient
        if ctx.then is not None:
            ctx.then()
        ctx.slot = ctx.then = None
        return None, None, None, None


def start(tensor: torch.Tensor) -> tuple[torch.Tensor, Slot]:
    """``tensor`` as the start of a graph, as a detached leaf would be, and where its gradient will be. Unlike a leaf
    it lives only as long as something that follows from it needs it."""
    slot = Slot(tensor)
    return _Start.apply(torch.empty(0, requires_grad=True), [tensor], slot, None), slot


class _Before(torch.autograd.Function):
    """What precedes a cut: an empty tensor, from which a backward enters the graph with the kept gradient."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, slot: Slot) -> torch.Tensor:
        ctx.slot = slot
        return output.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:  # type: ignore[override]
        return ctx.slot.take(), None


def leave(output: torch.Tensor) -> tuple[torch.Tensor, Slot]:
    """Where a backward enters the graph that computed ``output``, and where to put the output's gradient before.

    The entrance is empty and doesn't hold the output: its storage is free once whoever was given it has let go, unless
    the graph itself needs it.
    """
    slot = Slot(output)
    return _Before.apply(output, slot), slot


def cut(output: torch.Tensor, store: WeightGradients) -> torch.Tensor:
    """``output``, cut off from the graph that computed it: that part's backward is left for W.

    For layers that have weights but no input that needs a gradient (token tables, patch embeddings). W runs autograd
    through them, hooks of the parameters included. Until W their saved tensors and the output's gradient are held.
    """
    if not output.requires_grad:
        return output
    entrance, slot = leave(output)

    def work() -> None:
        torch.autograd.backward(entrance, entrance.new_empty(0))

    return _Start.apply(store.anchor, [output], slot, lambda: store.add(work))
