"""Weight gradients of a split backward: B stores what they need, W computes them.

Each (unit, segment) whose plan has a B and a W runs with its own :class:`WeightGradients`. Its layers store there what
a weight gradient needs instead of computing it, and W computes all of them. Several may wait between their B and their
W at the same time, and be computed in any order.
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
    """An all-gather along the first dimension that has been started."""

    __slots__ = ("_handle", "_part", "_whole")

    def __init__(self, part: torch.Tensor, group: Any):
        self._part = part  # Must stay allocated until it has been sent.
        self._whole = part.new_empty(part.size(0) * group.size(), *part.shape[1:])
        self._handle: Any = torch.distributed.all_gather_into_tensor(self._whole, part, group=group, async_op=True)

    def whole(self) -> torch.Tensor:
        """Wait for the all-gather and return its result."""
        self._handle.wait()
        return self._whole


@dataclass(slots=True)
class _Work:
    """One deferred weight gradient.

    Attributes:
        run: Computes the gradient from the operands.
        operands: A layer's input and the gradient of its output; empty if ``run`` holds its own tensors.
        gathered: Index of the operand of which this rank holds only a part, and the group to gather it over; None if
            both are whole.
    """

    run: Callable[..., None]
    operands: list[torch.Tensor | HostCopy] = field(default_factory=list)
    gathered: tuple[int, Any] | None = None

    def fetch(self, stream: Any) -> None:
        """Start copying operands back from host memory."""
        for x in self.operands:
            if isinstance(x, HostCopy):
                x.fetch(stream)

    def taken(self, stream: Any) -> list[torch.Tensor]:
        """Return all operands on the device and release them here."""
        operands, self.operands = self.operands, []
        return [x.take(stream) if isinstance(x, HostCopy) else x for x in operands]


def own_part(whole: torch.Tensor, group: Any) -> torch.Tensor:
    """Copy this rank's part along the first dimension of a tensor that is equal on all ranks of ``group``."""
    rows = whole.size(0) // group.size()
    return whole.narrow(0, group.rank() * rows, rows).clone()


class WeightGradients:
    """The deferred weight gradients of one (unit, segment), in the order in which B stored them.

    Under sequence parallelism one operand of a weight gradient (a column-parallel linear's input, or the gradient of a
    row-parallel linear's output) is stored as this rank's part and gathered in W. The gather overlaps with the product
    before it, so that only the first one is exposed. Operands in host memory (see :meth:`hosting`) are copied back
    during the two products before they are used.
    """

    __slots__ = ("_stream", "_work", "anchor")
    waits = True
    """Whether work is stored rather than computed at once. If it isn't, storing parts saves no memory."""

    def __init__(self) -> None:
        self._work: deque[_Work] = deque()
        self._stream: Any = None
        self.anchor = torch.empty(0, requires_grad=True)
        """An input for autograd functions whose other inputs may need no gradient; without it autograd would skip them.
        """

    @property
    def host_bytes(self) -> int:
        """Bytes of operands in host memory."""
        copies = [x for work in self._work for x in work.operands if isinstance(x, HostCopy)]
        return sum(x.host.untyped_storage().nbytes() for x in copies)

    def add(self, work: Callable[[], None]) -> None:
        """Store ``work`` for :meth:`compute`. It holds the tensors it needs."""
        self._work.append(_Work(work))

    def add_product(
        self, work: Callable[[torch.Tensor, torch.Tensor], None], input_: torch.Tensor, gradient: torch.Tensor,
        gathered: tuple[int, Any] | None = None,
    ) -> None:  # fmt: skip
        """Store ``work(input_, gradient)`` for :meth:`compute`.

        Args:
            work: Computes the weight gradient and accumulates it.
            input_: Input of the layer.
            gradient: Gradient of the layer's output.
            gathered: Which operand is this rank's part along the first dimension (0: the input, 1: the gradient), and
                the group over which to gather it before ``work`` runs; None if both are whole.
        """
        self._work.append(_Work(work, [input_, gradient], gathered))

    def hosting(self, offloaded: OffloadedActivations) -> WeightGradients:
        """Return a view of this store that keeps layer inputs in host memory until W.

        Args:
            offloaded: The offloaded activations of the same (unit, segment). Its side stream does the copies, and
                tensors that it knows as shared between layers stay on the device.
        """
        self._stream = offloaded.stream
        return _Hosting(self, offloaded)

    def prefetch(self) -> None:
        """Start copying back the operands of the first two gradients."""
        for work in list(self._work)[:2]:
            work.fetch(self._stream)

    def compute(self) -> None:
        """Run W: compute all gradients in the order in which B stored them, and free the operands of each."""
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
            del whole, operands  # Free them before the next ones are allocated.

    def _gather_next(self) -> _Gathering | None:
        """Start the all-gather for the first remaining gradient that needs one."""
        for work in self._work:
            if work.gathered is not None:
                place, group = work.gathered
                part = work.operands[place]
                if isinstance(part, HostCopy):
                    part = work.operands[place] = part.take(self._stream)
                return _Gathering(part, group)
        return None


class _Hosting(WeightGradients):
    """Adds to another store, with layer inputs in host memory."""

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
    """For layers that can defer weight gradients, in a backward that isn't split: computes each gradient when it is
    added."""

    __slots__ = ()
    waits = False

    def add(self, work: Callable[[], None]) -> None:
        """Compute the gradient."""
        work()

    def add_product(
        self, work: Callable[[torch.Tensor, torch.Tensor], None], input_: torch.Tensor, gradient: torch.Tensor,
        gathered: tuple[int, Any] | None = None,
    ) -> None:  # fmt: skip
        """Gather the operand that needs it and compute the gradient."""
        operands = [input_, gradient]
        if gathered is not None:
            place, group = gathered
            operands[place] = _Gathering(operands[place], group).whole()
        work(*operands)

    def hosting(self, offloaded: OffloadedActivations) -> WeightGradients:
        """Return self, since nothing is stored."""
        return self


def accumulate(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    """Add a weight gradient to ``main_grad`` if the parameter has one, else to ``grad``, as Megatron's DDP and autograd
    do.

    DDP's backward hook also registers the parameter as ready for reduction. Under a plan, reductions are started
    explicitly (see :mod:`dip_megatron.megatron.gradients`), so nothing is registered here.
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
    """Receives the gradient of a tensor that starts an autograd graph, without holding the tensor."""

    __slots__ = ("_like", "gradient")

    def __init__(self, tensor: torch.Tensor):
        self._like = (tensor.shape, tensor.dtype, tensor.device)
        self.gradient: torch.Tensor | None = None

    def take(self) -> torch.Tensor:
        """Return the gradient and release it here; zeros if no gradient arrived."""
        gradient, self.gradient = self.gradient, None
        if gradient is None:
            shape, dtype, device = self._like
            return torch.zeros(shape, dtype=dtype, device=device)
        return gradient


class _Start(torch.autograd.Function):
    """Returns the same values at the start of a new graph. The backward stores the gradient in a slot and calls
    ``then``."""

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
    """Make ``tensor`` the start of a new autograd graph, as a detached leaf would be.

    Unlike a leaf, the result is freed as soon as nothing in the graph needs it.

    Returns:
        The tensor, and the slot that will receive its gradient.
    """
    slot = Slot(tensor)
    return _Start.apply(torch.empty(0, requires_grad=True), [tensor], slot, None), slot


class _Before(torch.autograd.Function):
    """The end of the graph before a cut: an empty tensor, whose backward enters the graph with the gradient of its
    slot."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, slot: Slot) -> torch.Tensor:
        ctx.slot = slot
        return output.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:  # type: ignore[override]
        return ctx.slot.take(), None


def leave(output: torch.Tensor) -> tuple[torch.Tensor, Slot]:
    """Return an entrance to the graph that computed ``output``, and the slot in which to put the output's gradient.

    The entrance is an empty tensor and doesn't hold the output, whose storage is freed once its consumers have released
    it, unless the graph itself needs it.
    """
    slot = Slot(output)
    return _Before.apply(output, slot), slot


def cut(output: torch.Tensor, store: WeightGradients) -> torch.Tensor:
    """Cut ``output`` off from the graph that computed it, and defer the backward of that graph to W.

    For layers that have weights but no input that needs a gradient, such as embeddings. W runs autograd through them,
    including the hooks of their parameters. Their saved tensors and the output's gradient are held until W.
    """
    if not output.requires_grad:
        return output
    entrance, slot = leave(output)

    def work() -> None:
        torch.autograd.backward(entrance, entrance.new_empty(0))

    return _Start.apply(store.anchor, [output], slot, lambda: store.add(work))
