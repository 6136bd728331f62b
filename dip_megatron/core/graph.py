"""The operation graph: everything that a schedule may know about one iteration, and the dependency rule.

A *virtual microbatch* is the work of one unit in one segment, on all ranks (Megatron's term for one model chunk's work
on a microbatch). Virtual microbatches are numbered unit by unit in the order of :attr:`OperationGraph.units`, and
segment by segment within a unit. A *node* is one virtual microbatch on one rank. Arrays are indexed ``[strategy,
virtual microbatch, rank]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .modules import ModalityModule, Unit, trained_before
from .operations import Kind, Operation

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
PER_STRATEGY = ("forward", "backward", "weight", "fused", "activation", "deferred_activation")
"""The arrays of a graph that have one value for each memory strategy, virtual microbatch and rank."""


class Edges(NamedTuple):
    """The dependencies between forwards, as arrays. Backwards depend on each other along the same edges, reversed.

    Node number ``s * P + p`` is virtual microbatch s on rank p. Edge e leads from node ``source[e]`` to node
    ``target[e]``, and its transfer takes ``transfer[e]`` seconds. The edges into node n are
    ``before[before_start[n]:before_start[n + 1]]``, which are consecutive numbers; the edges out of it are
    ``after[after_start[n]:after_start[n + 1]]``, ordered by the nodes at their other ends.
    """

    source: Ints
    target: Ints
    transfer: Floats
    before_start: Ints
    after_start: Ints
    after: Ints


class Dependency(NamedTuple):
    """One end of a dependency: the operation of ``kind`` of the node (``virtual_microbatch``, ``rank``), with
    ``seconds`` for the transfer. ``B`` stands for whichever of B and BW the plan has for that node."""

    kind: Kind
    virtual_microbatch: int
    rank: int
    seconds: float


class GraphError(ValueError):
    """An inconsistent operation graph. The message names the place."""


@dataclass(frozen=True, eq=False, kw_only=True)
class OperationGraph:
    """The operations of one iteration, with durations (seconds), memory (bytes) and dependencies.

    C is the number of memory strategies, S the number of virtual microbatches and P the number of pipeline ranks.

    Attributes:
        ranks: P.
        modules: The modules of the model, upstream ones first.
        units: The sub-microbatches; the id of a unit is its position.
        forward: Seconds of F, ``[C, S, P]``.
        backward: Seconds of B (gradient of the input), ``[C, S, P]``.
        weight: Seconds of W (gradient of the weights), ``[C, S, P]``.
        fused: Seconds of BW, ``[C, S, P]``.
        activation: Bytes held from the start of F to the end of BW or B, ``[C, S, P]``.
        deferred_activation: Bytes that a node with a split backward still holds from the end of B to the end of W
            (inputs and output gradients of its linear layers), ``[C, S, P]``.
        transfer: Seconds of one transfer of a virtual microbatch's output, or of its gradient, ``[S]``.
        static_bytes: Bytes of parameters, gradients and optimizer state, ``[P]``.
        memory_limit: Bytes that a rank may use in total, ``[P]``; inf if there is no limit.
        strategies: Names of the C candidates, ``[s][rank][c]``, fastest first. Chunks with fewer candidates repeat
            their last one.
        overhead: For each rank, the seconds of each operation in which the rank does not compute but sends, receives
            and launches kernels. Empty if there are none. They are part of the durations; bubble ratios count them as
            idle.
    """

    ranks: int
    modules: tuple[ModalityModule, ...]
    units: tuple[Unit, ...]
    forward: Floats
    backward: Floats
    weight: Floats
    fused: Floats
    activation: Floats
    deferred_activation: Floats
    transfer: Floats
    static_bytes: Floats
    memory_limit: Floats
    strategies: tuple[tuple[tuple[str, ...], ...], ...] = field(default=())
    overhead: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        names = [m.name for m in self.modules]
        if len(set(names)) != len(names):
            raise GraphError(f"two modules share a name: {names}")
        known: set[str] = set()
        for m in self.modules:
            if any(len(counts) != self.ranks for counts in m.layers) or not m.layers:
                raise GraphError(f"module {m.name}: layers must be [segment][{self.ranks} ranks], got {m.layers}")
            if m.trainable and [len(r) for r in m.trainable] != [len(r) for r in m.layers]:
                raise GraphError(f"module {m.name}: trainable must have the shape of layers")
            if m.reversed and len(m.reversed) != m.segments:
                raise GraphError(f"module {m.name}: reversed must name each of its {m.segments} segments")
            if not set(m.upstream) <= known:
                raise GraphError(f"module {m.name}: upstream {m.upstream} must be listed before it, known: {known}")
            if m.replicated and m.segments > 1:
                raise GraphError(f"module {m.name}: a replicated module has one segment, got {m.segments}")
            known.add(m.name)
        for i, u in enumerate(self.units):
            if u.id != i:
                raise GraphError(f"unit {u.id} stands at place {i}; ids must be positions")
            if u.module not in known:
                raise GraphError(f"unit {i}: unknown module {u.module!r}")
            if (u.rank is not None) != self.module(u.module).replicated or not 0 <= (u.rank or 0) < self.ranks:
                raise GraphError(f"unit {i}: rank must be one of {self.ranks} if and only if {u.module} is replicated")
            for v in u.downstream:
                if not 0 <= v < len(self.units) or u.module not in self.module(self.units[v].module).upstream:
                    raise GraphError(f"unit {i} ({u.module}) cannot feed unit {v}")
        if not self.units:
            raise GraphError("no units: an iteration needs at least one microbatch")
        shape = (self.forward.shape[0], self.virtual_microbatches, self.ranks)
        for name in PER_STRATEGY:
            array = getattr(self, name)
            if array.shape != shape:
                raise GraphError(
                    f"{name} has shape {array.shape}, expected (strategies, virtual microbatches, ranks) = {shape}"
                )
            if not np.all(np.isfinite(array)) or np.any(array < 0):
                raise GraphError(f"{name} must be finite and not negative")
        if self.transfer.shape != (self.virtual_microbatches,):
            raise GraphError(f"transfer has shape {self.transfer.shape}, expected ({self.virtual_microbatches},)")
        if self.static_bytes.shape != (self.ranks,) or self.memory_limit.shape != (self.ranks,):
            raise GraphError(f"static_bytes and memory_limit must have shape ({self.ranks},)")
        if self.overhead and (len(self.overhead) != self.ranks or not all(0 <= s < np.inf for s in self.overhead)):
            raise GraphError(f"overhead must be {self.ranks} numbers, finite and not negative: {self.overhead}")

    # -- names and numbers ---------------------------------------------------------------------------------------
    @cached_property
    def _module_by_name(self) -> dict[str, ModalityModule]:
        return {m.name: m for m in self.modules}

    def module(self, name: str) -> ModalityModule:
        return self._module_by_name[name]

    @cached_property
    def first_virtual_microbatch(self) -> tuple[int, ...]:
        """The virtual microbatch of segment 0 of each unit."""
        first, n = [], 0
        for u in self.units:
            first.append(n)
            n += self._module_by_name[u.module].segments
        return tuple(first)

    @cached_property
    def virtual_microbatches(self) -> int:
        """S, the number of virtual microbatches."""
        return sum(self._module_by_name[u.module].segments for u in self.units)

    @cached_property
    def unit_of(self) -> Ints:
        """The unit id of each virtual microbatch, ``[S]``."""
        return np.concatenate(
            [np.full(self._module_by_name[u.module].segments, u.id, dtype=np.int32) for u in self.units]
        )

    def virtual_microbatch(self, unit: int, segment: int) -> int:
        return self.first_virtual_microbatch[unit] + segment

    def segment(self, virtual_microbatch: int) -> int:
        return virtual_microbatch - self.first_virtual_microbatch[int(self.unit_of[virtual_microbatch])]

    def operation(self, kind: Kind, virtual_microbatch: int, rank: int) -> Operation:
        unit = self.units[int(self.unit_of[virtual_microbatch])]
        return Operation(kind, unit.module, self.segment(virtual_microbatch), unit.id, rank)

    def virtual_microbatch_of(self, operation: Operation) -> int:
        """The virtual microbatch of an operation. Raises GraphError if the operation is not in this graph."""
        if not 0 <= operation.unit < len(self.units) or self.units[operation.unit].module != operation.module:
            raise GraphError(f"{operation} is not an operation of this graph")
        if not (0 <= operation.segment < self.module(operation.module).segments and 0 <= operation.rank < self.ranks):
            raise GraphError(f"{operation} is not an operation of this graph")
        return self.virtual_microbatch(operation.unit, operation.segment)

    @cached_property
    def is_reversed(self) -> NDArray[np.bool_]:
        """Whether each virtual microbatch runs from the last rank to rank 0, ``[S]``."""
        flags = [
            m.runs_back(k) for u in self.units for m in [self._module_by_name[u.module]] for k in range(m.segments)
        ]
        return np.array(flags, dtype=np.bool_)

    @cached_property
    def only_rank(self) -> Ints:
        """The single rank on which each virtual microbatch of a replicated module runs, ``[S]``; -1 for virtual
        microbatches that pass over all ranks."""
        ranks = np.array([-1 if u.rank is None else u.rank for u in self.units], dtype=np.int32)
        return ranks[self.unit_of]

    @cached_property
    def is_idle(self) -> NDArray[np.bool_]:
        """The nodes of replicated modules on ranks where their unit does not run, ``[S, P]``. They take no time, have
        no dependencies and no backward, and exist only so that every rank's order holds every virtual microbatch."""
        only = self.only_rank[:, None]
        idle: NDArray[np.bool_] = (only >= 0) & (only != np.arange(self.ranks, dtype=np.int32))
        return idle

    def entry_rank(self, virtual_microbatch: int) -> int:
        """The rank where a virtual microbatch's forward starts and its backward ends."""
        only = int(self.only_rank[virtual_microbatch])
        return only if only >= 0 else self.ranks - 1 if self.is_reversed[virtual_microbatch] else 0

    def exit_rank(self, virtual_microbatch: int) -> int:
        """The rank where a virtual microbatch's forward ends and its backward starts."""
        only = int(self.only_rank[virtual_microbatch])
        return only if only >= 0 else 0 if self.is_reversed[virtual_microbatch] else self.ranks - 1

    def link_transfer(self, before: int, after: int) -> float:
        """Seconds of the transfer from the last rank of virtual microbatch ``before`` to the first rank of ``after``.
        It is 0 where both are on the same rank: where the direction reverses, or around a replicated module."""
        if self.only_rank[before] >= 0 or self.only_rank[after] >= 0:
            stays = self.exit_rank(before) == self.entry_rank(after)
        else:
            stays = bool(self.is_reversed[before] != self.is_reversed[after])
        return 0.0 if stays else float(self.transfer[before])

    # -- the dependency rule -------------------------------------------------------------------------------------
    @cached_property
    def previous_virtual_microbatches(self) -> tuple[tuple[int, ...], ...]:
        """For each virtual microbatch, those whose forwards must end before its own may start on its entry rank. A unit
        that several others feed has several."""
        previous: list[list[int]] = [[] for _ in range(self.virtual_microbatches)]
        for u in self.units:
            start = self.first_virtual_microbatch[u.id]
            last = start + self._module_by_name[u.module].segments - 1
            for s in range(start, last):
                previous[s + 1].append(s)
            for v in u.downstream:
                previous[self.first_virtual_microbatch[v]].append(last)
        return tuple(tuple(p) for p in previous)

    @cached_property
    def next_virtual_microbatches(self) -> tuple[tuple[int, ...], ...]:
        """The inverse of :attr:`previous_virtual_microbatches`."""
        following: list[list[int]] = [[] for _ in range(self.virtual_microbatches)]
        for s, previous in enumerate(self.previous_virtual_microbatches):
            for p in previous:
                following[p].append(s)
        return tuple(tuple(n) for n in following)

    @cached_property
    def edges(self) -> Edges:
        """The dependency rule, from which all other dependencies follow: the forwards that each node's forward waits
        for.

        A forward waits for the forward of the same virtual microbatch on the previous rank. On the entry rank (rank 0,
        the last rank in a reversed segment, or the unit's rank in a replicated module) it waits for the forward of
        every previous virtual microbatch on that one's exit rank. :meth:`inputs` derives the dependencies of backwards.
        """
        ranks, transfer = self.ranks, self.transfer.tolist()
        into: list[list[tuple[int, float]]] = [[] for _ in range(self.virtual_microbatches * ranks)]
        for s in range(self.virtual_microbatches):
            entry, step = self.entry_rank(s), -1 if self.is_reversed[s] else 1
            into[s * ranks + entry] += [
                (q * ranks + self.exit_rank(q), self.link_transfer(q, s)) for q in self.previous_virtual_microbatches[s]
            ]
            for p in range(ranks):
                if p != entry and self.only_rank[s] < 0:
                    into[s * ranks + p].append((s * ranks + p - step, transfer[s]))
        counts = [len(edges) for edges in into]
        source = np.array([n for edges in into for n, _ in edges], dtype=np.int32)
        target = np.repeat(np.arange(len(into), dtype=np.int32), counts)
        after = np.argsort(source, kind="stable").astype(np.int32)
        return Edges(
            source,
            target,
            np.array([seconds for edges in into for _, seconds in edges], dtype=np.float64),
            np.cumsum([0, *counts]).astype(np.int32),
            np.cumsum([0, *np.bincount(source, minlength=len(into))]).astype(np.int32),
            after,
        )

    @cached_property
    def has_weight(self) -> NDArray[np.bool_]:
        """Whether the node's chunk is trainable, ``[S, P]``."""
        ranks = range(self.ranks)
        trains = {m.name: [[m.trains(k, r) for r in ranks] for k in range(m.segments)] for m in self.modules}
        return self._by_chunk(trains) & ~self.is_idle

    @cached_property
    def has_backward(self) -> NDArray[np.bool_]:
        """Whether the node's chunk or anything before it in the model trains, ``[S, P]``. This does not depend on the
        batch."""
        return (self._by_chunk(trained_before(self.modules)) & ~self.is_idle) | self.has_weight

    def _by_chunk(self, flags: dict[str, list[list[bool]]]) -> NDArray[np.bool_]:
        """Expands flags ``[segment][rank]`` of each module to ``[S, P]``."""
        tables = {name: np.array(lines, dtype=np.bool_) for name, lines in flags.items()}
        return np.concatenate([tables[u.module] for u in self.units])

    @cached_property
    def _adjacency(self) -> tuple[list[int], list[int], list[float], list[int], list[int], list[int]]:
        """:attr:`edges` as lists, in which looking up single nodes is faster than in arrays."""
        e = self.edges
        return (
            e.source.tolist(), e.target.tolist(), e.transfer.tolist(), e.before_start.tolist(), e.after_start.tolist(),
            e.after.tolist(),
        )  # fmt: skip

    def _forwards_before(self, node: int) -> tuple[Dependency, ...]:
        """The forwards that a node's forward waits for."""
        source, _, seconds, into, _, _ = self._adjacency
        ranks = self.ranks
        return tuple(
            Dependency(Kind.F, source[i] // ranks, source[i] % ranks, seconds[i])
            for i in range(into[node], into[node + 1])
        )

    def _backwards_before(self, node: int) -> tuple[Dependency, ...]:
        """The backwards that a node's backward waits for."""
        _, target, seconds, _, out_of, after = self._adjacency
        ranks = self.ranks
        return tuple(
            Dependency(Kind.B, target[i] // ranks, target[i] % ranks, seconds[i])
            for i in after[out_of[node] : out_of[node + 1]]
        )

    def inputs(self, kind: Kind, virtual_microbatch: int, rank: int) -> tuple[Dependency, ...]:
        """The operations that must end before an operation may start, other than through its rank's order.

        F waits along :attr:`edges`. B and BW wait for the F of their node, and along the same edges in reverse: for the
        B of the next rank, or, on the exit rank, for the B of every next virtual microbatch on that one's entry rank. W
        waits for the B of its node.
        """
        node = virtual_microbatch * self.ranks + rank
        if kind == Kind.F:
            return self._forwards_before(node)
        if kind == Kind.W:
            return (Dependency(Kind.B, virtual_microbatch, rank, 0.0),)
        own = Dependency(Kind.F, virtual_microbatch, rank, 0.0)
        return (own, *self._backwards_before(node))

    def outputs(self, kind: Kind, virtual_microbatch: int, rank: int) -> tuple[Dependency, ...]:
        """The operations that wait for the data of an operation: the inverse of :meth:`inputs` between nodes. A
        gradient is not sent to nodes that have no backward."""
        node = virtual_microbatch * self.ranks + rank
        if kind == Kind.W:
            return ()
        if kind == Kind.F:
            return tuple(d._replace(kind=Kind.F) for d in self._backwards_before(node))
        readers = (d._replace(kind=Kind.B) for d in self._forwards_before(node))
        return tuple(d for d in readers if self.has_backward[d.virtual_microbatch, d.rank])

    # -- views ---------------------------------------------------------------------------------------------------
    @property
    def candidates(self) -> int:
        """C, the number of memory strategies."""
        return int(self.forward.shape[0])

    def strategy_name(self, strategy: int, virtual_microbatch: int, rank: int) -> str:
        return self.strategies[virtual_microbatch][rank][strategy] if self.strategies else "none"

    def repriced(self, **fields: Any) -> OperationGraph:
        """The graph with other arrays per strategy, or other names of strategies. The dependencies are kept and not
        computed again."""
        graph = replace(self, **fields)
        graph.__dict__.update({name: self.__dict__[name] for name in _STRUCTURE if name in self.__dict__})
        return graph

    def changed(self, change: Callable[[Floats], Floats], **others: Any) -> OperationGraph:
        """The graph with ``change`` applied to each array that has a value per strategy, and the fields ``others``
        replaced."""
        arrays: dict[str, Any] = {name: change(getattr(self, name)) for name in PER_STRATEGY}
        return replace(self, **arrays, **others)

    def project(self, strategy: NDArray[np.int8]) -> OperationGraph:
        """The graph with one strategy per node (``strategy`` is ``[S, P]``), so that C = 1."""
        index = strategy[None].astype(np.int64)

        def pick(array: Floats) -> Floats:
            return np.ascontiguousarray(np.take_along_axis(array, index, axis=0))

        known: dict[str, tuple[str]] = {}  # one tuple for each name, as many nodes share it
        names = tuple(
            tuple(known.setdefault(name, (name,)) for name in (self.strategy_name(c, s, p) for p, c in enumerate(line)))
            for s, line in enumerate(strategy.tolist())
        )
        return self.repriced(**{name: pick(getattr(self, name)) for name in PER_STRATEGY}, strategies=names)


_STRUCTURE = (
    "_module_by_name", "first_virtual_microbatch", "virtual_microbatches", "unit_of", "is_reversed",
    "only_rank", "is_idle",
    "previous_virtual_microbatches", "next_virtual_microbatches", "edges", "has_weight", "has_backward", "_adjacency",
)  # fmt: skip
"""The cached properties that do not depend on costs."""
