"""Runs the operations of a plan on a model's chunks with autograd, inside Megatron's own step functions where it has
them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch

from ..core import Compute, Kind, Message, Operation, Plan, Unit
from ..core.lower import incoming
from ..core.strategies import names_in, offloads
from .deferred import Slot, WeightGradients, leave, start
from .layer_context import layer_strategies
from .offload import OffloadedActivations
from .protocol import Inputs, MicrobatchInputs, RunnableChunks
from .transport import Tensors


@dataclass(frozen=True)
class LossPart:
    """The part of a microbatch's loss that one unit of the last module computes.

    Attributes:
        first: Index of the unit's first instance in its microbatch.
        share: The unit's share of the microbatch's mean loss, between 0 and 1.
    """

    first: int = 0
    share: float = 1.0


class StepFunctions(Protocol):
    """Megatron's code around forward, loss, backward and weight gradients; see :mod:`dip_megatron.megatron.step`."""

    def forward(self, chunk: torch.nn.Module, compute: Callable[[], Tensors]) -> Tensors:
        """Run a forward that computes no loss, with Megatron's timers, autocast and loss scaling around ``compute``."""
        ...

    def loss(
        self, chunk: torch.nn.Module, model: Any, items: list[Any] | None, microbatch: int, part: LossPart
    ) -> torch.Tensor:
        """Run the script's ``forward_step`` with ``model`` on a microbatch's raw items; return the scaled loss of
        ``part``."""
        ...

    def backward(self, outputs: list[torch.Tensor], gradients: list[torch.Tensor] | None) -> None:
        """Run autograd's backward from ``outputs``; ``gradients`` is None when the output is the loss."""
        ...

    def weight(self, gradients: WeightGradients) -> None:
        """Compute the weight gradients that a B operation deferred."""
        ...


class ModelStandIn:
    """The model that a script's ``forward_step`` receives. It can be called once, and gives access to the attributes of
    the real chunk and of the modules inside its wrappers."""

    vp_stage = 0
    """Always 0, as in a pipeline without virtual stages. Under DIP a loop's settings declare no virtual stages either,
    so that the pipeline rank alone determines which parts of a batch a rank needs."""

    pg_collection: Any
    """Megatron's process groups, set only where the script must see other groups than the chunk's."""

    def __init__(self, chunk: torch.nn.Module, call: Callable[..., Any]):
        self._chunk = chunk
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        held = self._chunk
        while not hasattr(held, name) and isinstance(getattr(held, "module", None), torch.nn.Module):
            held = held.module  # type: ignore[assignment]
        return getattr(held, name)


@dataclass
class _Saved:
    """What a backward needs from its forward.

    Attributes:
        inputs: For each input payload, the slot of each tensor that receives a gradient.
        outputs: For each output tensor, an entrance to its autograd graph and the slot for its gradient.
        weights: Deferred weight gradients; None if the backward isn't split.
        offloaded: Activations in host memory; None if nothing is offloaded.
        loss: The loss, if the forward computed it; it then has no outputs.
    """

    inputs: list[dict[str, Slot]]
    outputs: dict[str, tuple[torch.Tensor, Slot]]
    weights: WeightGradients | None
    offloaded: OffloadedActivations | None
    loss: torch.Tensor | None = None


@dataclass
class IterationState:
    """The microbatches and saved activations of one iteration. Dictionaries are keyed by (unit, segment).

    Attributes:
        microbatches: The iteration's microbatches.
        forward_only: Whether this is an evaluation, which runs no backward.
        saved: What each pending backward needs.
        left: Weight gradients between their B and their W.
        remaining: How many weight gradients each chunk (module, segment) still has to compute.
    """

    microbatches: list[MicrobatchInputs]
    forward_only: bool
    saved: dict[tuple[int, int], _Saved] = field(default_factory=dict)
    left: dict[tuple[int, int], WeightGradients] = field(default_factory=dict)
    remaining: dict[tuple[str, int], int] = field(default_factory=dict)


@dataclass(frozen=True)
class OperationLookAhead:
    """Facts about a rank's plan that must be known before its operations run. Keys are (unit, segment) unless noted.

    Attributes:
        split: Those whose backward is split into B and W.
        offloaded_next: For an operation, the (unit, segment) of the operation right after it, if that one is a backward
            or a W that needs activations from host memory.
        forward_only: Those without a backward, because nothing before them trains.
        sources: The units whose payloads a forward receives.
        constant: For each received payload, the names of the tensors that get no gradient.
        parts: Ids of the units that share their microbatch with another unit of the last module.
    """

    split: frozenset[tuple[int, int]] = frozenset()
    offloaded_next: Mapping[Operation, tuple[int, int]] = field(default_factory=dict)
    forward_only: frozenset[tuple[int, int]] = frozenset()
    sources: Mapping[tuple[int, int], tuple[Unit, ...]] = field(default_factory=dict)
    constant: Mapping[tuple[int, int], tuple[frozenset[str], ...]] = field(default_factory=dict)
    parts: frozenset[int] = frozenset()

    @staticmethod
    def of(plan: Plan, rank: int) -> OperationLookAhead:
        """Collect these facts from the actions of ``rank`` in ``plan``."""
        actions = [a for a in plan.actions[rank] if isinstance(a, Compute)]
        split = frozenset((a.operation.unit, a.operation.segment) for a in actions if a.operation.kind == Kind.W)
        following = {
            before.operation: (after.operation.unit, after.operation.segment)
            for before, after in pairwise(actions)
            if after.operation.kind != Kind.F and offloads(names_in(after.strategy))
        }
        backward = {(a.operation.unit, a.operation.segment) for a in actions if a.operation.kind in (Kind.B, Kind.BW)}
        sources, constant = {}, {}
        graph = plan.graph
        for operation in (a.operation for a in actions if a.operation.kind == Kind.F):
            messages = incoming(graph, operation)
            sources[operation.unit, operation.segment] = tuple(graph.units[m.source.unit] for m in messages)
            constant[operation.unit, operation.segment] = tuple(_constant(plan, m) for m in messages)
        last = [u for u in graph.units if u.module == graph.modules[-1].name]
        several = Counter(u.microbatch for u in last)
        return OperationLookAhead(
            split, following, frozenset(sources) - backward, sources, constant,
            frozenset(u.id for u in last if several[u.microbatch] > 1),
        )  # fmt: skip


def _constant(plan: Plan, message: Message) -> frozenset[str]:
    """Return the names of a message's tensors that get no gradient, because nothing before them trains."""
    graph = plan.graph
    source, target = graph.virtual_microbatch_of(message.source), graph.virtual_microbatch_of(message.target)
    alive = graph.has_backward[source, message.source.rank]
    payload = plan.payload(source, target, message.source.rank) or ()
    return frozenset(t.name for t in payload if not (alive and t.differentiable))


class ChunkRunner:
    """Computes the operations of one rank: the :class:`OperationRunner` of the executor."""

    def __init__(
        self,
        program: RunnableChunks,
        chunks: list[torch.nn.Module],
        step: StepFunctions,
        state: IterationState,
        *,
        last_rank: int,
        look_ahead: OperationLookAhead | None = None,
        on_chunk_done: Callable[[int], None] = lambda _: None,
        on_reduce: Callable[[int], None] = lambda _: None,
    ):
        """Create a runner for one iteration.

        Args:
            program: The model's program.
            chunks: This rank's chunks, wrapped as Megatron wraps them (DDP, Float16Module), in the program's order.
            step: Megatron's step functions.
            state: The iteration's microbatches and saved activations.
            last_rank: Pipeline rank that computes the loss.
            look_ahead: Facts about the rank's plan; the default has no split, offloading or frozen parts.
            on_chunk_done: Called with a chunk's index after its last weight gradient of the iteration, if the chunk is
                counted in ``state.remaining``.
            on_reduce: Called with a chunk's index where the plan starts the reduction of its gradients.
        """
        self._program = program
        self._step = step
        self._state = state
        self._on_chunk_done, self._on_reduce = on_chunk_done, on_reduce
        places = [(m.name, k) for m in program.modules for k in range(m.segments)]
        self._index = {place: i for i, place in enumerate(places)}
        self._chunks = chunks
        self._mode = program.mode
        self._look_ahead = look_ahead or OperationLookAhead()
        self._layers = {place: m.layers[place[1]] for m in program.modules for place in places if place[0] == m.name}
        final = program.modules[-1]
        self._final = (final.name, final.segments - 1, last_rank)

    @property
    def microbatches(self) -> Sequence[MicrobatchInputs]:
        """The iteration's microbatches."""
        return self._state.microbatches

    def forward(self, operation: Operation, unit: Unit, strategy: str, inputs: list[Tensors]) -> Tensors:
        self._prefetch_after(operation)
        if unit.rank not in (None, operation.rank):
            return {}  # The module is replicated, and another rank's replica processes this unit.
        chunk = self._chunks[self._index[operation.module, operation.segment]]
        microbatch = self._state.microbatches[unit.microbatch]
        place = (operation.unit, operation.segment)
        train = not self._state.forward_only and place not in self._look_ahead.forward_only
        slots: list[dict[str, Slot]] = []
        if train:
            constant = self._look_ahead.constant.get(place) or (frozenset(),) * len(inputs)
            begun = [
                {name: start(t) for name, t in payload.items() if t.is_floating_point() and name not in names}
                for payload, names in zip(inputs, constant, strict=True)
            ]
            slots = [{name: slot for name, (_, slot) in payload.items()} for payload in begun]
            inputs = [
                {name: own[name][0] if name in own else t for name, t in payload.items()}
                for payload, own in zip(inputs, begun, strict=True)
            ]
            del begun
        weights = offloaded = None
        strategies: tuple[str, ...] = ()
        if train:
            strategies = layer_strategies(strategy, self._layers[operation.module, operation.segment][operation.rank])
            if place in self._look_ahead.split:
                weights = WeightGradients()
            if offloads(strategies):
                offloaded = self._mode.offload()
        is_loss = (operation.module, operation.segment, operation.rank) == self._final
        given = Inputs(inputs, unit, self._look_ahead.sources.get(place, ()))
        del inputs
        outputs: Tensors = {}
        loss = None
        # Gradients are enabled even where nothing trains: MoE routers count tokens only when they are.
        with self._mode.stage(weights, strategies, offloaded), torch.set_grad_enabled(not self._state.forward_only):
            if is_loss:
                model = ModelStandIn(
                    chunk, lambda *a, **k: self._program.final(chunk, given, self._program.bind(*a, **k))
                )
                part = LossPart()
                if unit.id in self._look_ahead.parts:
                    part = LossPart(unit.first, self._program.loss_share(unit, microbatch.arguments))
                loss = self._step.loss(chunk, model, microbatch.items, unit.microbatch, part)
            else:
                outputs = self._step.forward(
                    chunk, lambda: self._program.forward(chunk, operation, unit, given, microbatch)
                )
        if train:
            left = {name: leave(t) for name, t in outputs.items() if t.requires_grad}
            self._state.saved[place] = _Saved(slots, left, weights, offloaded, loss)
            return outputs
        return {name: t.detach() for name, t in outputs.items()}

    def backward(self, operation: Operation, unit: Unit, strategy: str, gradients: list[Tensors]) -> list[Tensors]:
        saved = self._state.saved.pop((operation.unit, operation.segment))
        if saved.offloaded is not None:
            saved.offloaded.prefetch()
        self._prefetch_after(operation)
        with self._mode.stage(saved.weights):
            self._differentiate(saved, gradients)
        results = [{name: slot.take() for name, slot in payload.items()} for payload in saved.inputs]
        if saved.weights is not None:
            self._state.left[operation.unit, operation.segment] = saved.weights
        elif operation.kind == Kind.BW:
            self._chunk_progress(operation)
        return results

    def _differentiate(self, saved: _Saved, gradients: list[Tensors]) -> None:
        if saved.loss is not None:
            self._step.backward([saved.loss], None)
            return
        for name, (_, slot) in saved.outputs.items():
            # An output with several consumers gets the sum of their gradients.
            sent = [payload[name] for payload in gradients if name in payload]
            if sent:
                slot.gradient = sent[0] if len(sent) == 1 else torch.stack(sent).sum(0)
        entrances = [entrance for entrance, _ in saved.outputs.values()]
        if entrances:
            self._step.backward(entrances, [torch.empty_like(entrance) for entrance in entrances])

    def weight(self, operation: Operation, unit: Unit, strategy: str) -> None:
        self._prefetch_after(operation)
        self._step.weight(self._state.left.pop((operation.unit, operation.segment)))
        self._chunk_progress(operation)

    def reduce(self, module: str, segment: int) -> None:
        self._on_reduce(self._index[module, segment])

    def _prefetch_after(self, operation: Operation) -> None:
        """Start copying activations back from host memory for the next operation, while this one computes."""
        following = self._look_ahead.offloaded_next.get(operation)
        if following in self._state.saved:
            offloaded = self._state.saved[following].offloaded
            if offloaded is not None:
                offloaded.prefetch()
        elif following in self._state.left:
            self._state.left[following].prefetch()

    def _chunk_progress(self, operation: Operation) -> None:
        place = (operation.module, operation.segment)
        self._state.remaining[place] -= 1
        if not self._state.remaining[place]:
            self._on_chunk_done(self._index[place])


class ReplayIterator:
    """Yields the raw items of a microbatch again, for the ``forward_step`` that computes its loss."""

    def __init__(self, items: list[Any]):
        self._items = iter(items)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return copy.copy(next(self._items))  # Scripts may modify a batch's dict.
