"""The stage graph: everything the planner knows about one iteration, and the one dependency rule.

Rows and ranks: the stages of one unit in one segment form a *row* with one stage per pipeline rank; rows are numbered
unit by unit in the order of :attr:`StageGraph.units`, segment by segment. Arrays are indexed ``[strategy, row, rank]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .operations import Kind, StageKey

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


class Edges(NamedTuple):
    """The dependencies of forwards, as arrays. A *node* is a stage, ``row * P + rank``; edge e leads from node
    ``source[e]`` to node ``target[e]``, ``hop[e]`` seconds away; backwards go the other way.

    Edges into node n are ``before[before_start[n]:before_start[n + 1]]`` (consecutive numbers), those out of it
    ``after[after_start[n]:after_start[n + 1]]``, in the order of the rows at their other ends.
    """

    source: Ints
    target: Ints
    hop: Floats
    before_start: Ints
    after_start: Ints
    after: Ints


class GraphError(ValueError):
    """A stage graph that contradicts itself; the message names the place."""


@dataclass(frozen=True)
class ModalityModule:
    """One network of the model (ViT, LLM, DiT), cut into ``segments`` passes over all ranks.

    ``layers[segment][rank]`` is the number of transformer layers of each chunk. ``upstream`` names the modules whose
    outputs feed this module's first segment. ``trainable[segment][rank]`` says whether the chunk has weight gradients
    (a frozen ViT with a trained projector is trainable in its very last chunk only); empty means all of it.
    ``reversed[segment]`` is True for a segment that runs from the last rank to rank 0 (the second half of a V-shaped
    placement); empty means that none does.
    """

    name: str
    layers: tuple[tuple[int, ...], ...]
    upstream: tuple[str, ...] = ()
    trainable: tuple[tuple[bool, ...], ...] = ()
    reversed: tuple[bool, ...] = ()

    @property
    def segments(self) -> int:
        return len(self.layers)

    def trains(self, segment: int, rank: int) -> bool:
        return self.trainable[segment][rank] if self.trainable else True

    def runs_back(self, segment: int) -> bool:
        return self.reversed[segment] if self.reversed else False


def trained_before(modules: Sequence[ModalityModule]) -> dict[str, list[list[bool]]]:
    """``[segment][rank]`` of each module: whether anything before the chunk in the model trains, so that a gradient has
    to pass through it."""
    reached: dict[str, bool] = {}
    flags: dict[str, list[list[bool]]] = {}
    for m in modules:
        alive = any(reached[u] for u in m.upstream)
        flags[m.name] = [[False] * len(line) for line in m.layers]
        for k, line in enumerate(m.layers):
            ranks = range(len(line))
            for r in reversed(ranks) if m.runs_back(k) else ranks:
                flags[m.name][k][r] = alive
                alive = alive or m.trains(k, r)
        reached[m.name] = alive
    return flags


@dataclass(frozen=True)
class Unit:
    """A sub-microbatch: the slice of one microbatch that one module processes at a time.

    ``id`` is its position in :attr:`StageGraph.units`. ``first`` and ``count`` say which instances (images, clips,
    packed sequences) of the microbatch it holds. ``feeds`` are the ids of the downstream units that wait for it.
    """

    id: int
    module: str
    microbatch: int
    first: int = 0
    count: int = 1
    feeds: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class StageGraph:
    """Stages of one iteration with durations (seconds), bytes and dependencies.

    With C memory strategies, S rows and P ranks: ``forward``, ``backward`` (input gradient), ``weight`` (weight
    gradient) and ``fused`` (both at once) are seconds ``[C, S, P]``. ``activation`` ``[C, S, P]`` are the bytes held
    from the start of F to the end of BW or B; ``hold`` ``[C, S, P]`` the bytes a split stage still holds from the end
    of B to the end of W (inputs and output gradients of its linears). ``hop`` ``[S]`` is the seconds one transfer of
    the row's output (or of its gradient) takes. ``static_bytes`` ``[P]`` are parameters, gradients and optimizer
    state; ``memory_limit`` ``[P]`` is what a rank may use in all (inf: no limit). ``strategies[row][rank]`` names the C
    candidates, fastest first; chunks with fewer candidates repeat their last one.
    """

    ranks: int
    modules: tuple[ModalityModule, ...]
    units: tuple[Unit, ...]
    forward: Floats
    backward: Floats
    weight: Floats
    fused: Floats
    activation: Floats
    hold: Floats
    hop: Floats
    static_bytes: Floats
    memory_limit: Floats
    strategies: tuple[tuple[tuple[str, ...], ...], ...] = field(default=())

    def __post_init__(self) -> None:
        names = [m.name for m in self.modules]
        if len(set(names)) != len(names):
            raise GraphError(f"two modules share a name: {names}")
        known: set[str] = set()
        for m in self.modules:
            if any(len(row) != self.ranks for row in m.layers) or not m.layers:
                raise GraphError(f"module {m.name}: layers must be [segment][{self.ranks} ranks], got {m.layers}")
            if m.trainable and [len(r) for r in m.trainable] != [len(r) for r in m.layers]:
                raise GraphError(f"module {m.name}: trainable must have the shape of layers")
            if m.reversed and len(m.reversed) != m.segments:
                raise GraphError(f"module {m.name}: reversed must name each of its {m.segments} segments")
            if not set(m.upstream) <= known:
                raise GraphError(f"module {m.name}: upstream {m.upstream} must be listed before it, known: {known}")
            known.add(m.name)
        for i, u in enumerate(self.units):
            if u.id != i:
                raise GraphError(f"unit {u.id} stands at place {i}; ids must be positions")
            if u.module not in known:
                raise GraphError(f"unit {i}: unknown module {u.module!r}")
            for v in u.feeds:
                if not 0 <= v < len(self.units) or u.module not in self.module(self.units[v].module).upstream:
                    raise GraphError(f"unit {i} ({u.module}) cannot feed unit {v}")
        if not self.units:
            raise GraphError("no units: an iteration needs at least one microbatch")
        shape = (self.forward.shape[0], self.rows, self.ranks)
        for name in ("forward", "backward", "weight", "fused", "activation", "hold"):
            array = getattr(self, name)
            if array.shape != shape:
                raise GraphError(f"{name} has shape {array.shape}, expected (strategies, rows, ranks) = {shape}")
            if not np.all(np.isfinite(array)) or np.any(array < 0):
                raise GraphError(f"{name} must be finite and not negative")
        if self.hop.shape != (self.rows,):
            raise GraphError(f"hop has shape {self.hop.shape}, expected ({self.rows},)")
        if self.static_bytes.shape != (self.ranks,) or self.memory_limit.shape != (self.ranks,):
            raise GraphError(f"static_bytes and memory_limit must have shape ({self.ranks},)")

    # -- names and numbers ---------------------------------------------------------------------------------------
    @cached_property
    def _module_by_name(self) -> dict[str, ModalityModule]:
        return {m.name: m for m in self.modules}

    def module(self, name: str) -> ModalityModule:
        return self._module_by_name[name]

    @cached_property
    def first_row(self) -> tuple[int, ...]:
        """Row of segment 0 of each unit."""
        rows, n = [], 0
        for u in self.units:
            rows.append(n)
            n += self._module_by_name[u.module].segments
        return tuple(rows)

    @cached_property
    def rows(self) -> int:
        """S: number of rows."""
        return sum(self._module_by_name[u.module].segments for u in self.units)

    @cached_property
    def row_unit(self) -> Ints:
        """Unit id of each row, ``[S]``."""
        return np.concatenate(
            [np.full(self._module_by_name[u.module].segments, u.id, dtype=np.int32) for u in self.units]
        )

    def row(self, unit: int, segment: int) -> int:
        return self.first_row[unit] + segment

    def segment(self, row: int) -> int:
        return row - self.first_row[int(self.row_unit[row])]

    def key(self, kind: Kind, row: int, rank: int) -> StageKey:
        unit = self.units[int(self.row_unit[row])]
        return StageKey(kind, unit.module, self.segment(row), unit.id, rank)

    def row_of(self, key: StageKey) -> int:
        """Row of a stage key. Raises GraphError if the key is not a stage of this graph."""
        if not 0 <= key.unit < len(self.units) or self.units[key.unit].module != key.module:
            raise GraphError(f"{key} is not a stage of this graph")
        if not (0 <= key.segment < self.module(key.module).segments and 0 <= key.rank < self.ranks):
            raise GraphError(f"{key} is not a stage of this graph")
        return self.row(key.unit, key.segment)

    @cached_property
    def row_reversed(self) -> NDArray[np.bool_]:
        """``[S]``: the row runs from the last rank to rank 0."""
        flags = [
            m.runs_back(k) for u in self.units for m in [self._module_by_name[u.module]] for k in range(m.segments)
        ]
        return np.array(flags, dtype=np.bool_)

    def entry_rank(self, row: int) -> int:
        """The rank where the row's forward starts (and its backward ends)."""
        return self.ranks - 1 if self.row_reversed[row] else 0

    def exit_rank(self, row: int) -> int:
        """The rank where the row's forward ends (and its backward starts)."""
        return 0 if self.row_reversed[row] else self.ranks - 1

    def link_hop(self, before: int, after: int) -> float:
        """Seconds from the last stage of row ``before`` to the first of row ``after``: nothing travels at a turn."""
        return 0.0 if self.row_reversed[before] != self.row_reversed[after] else float(self.hop[before])

    # -- the dependency rule -------------------------------------------------------------------------------------
    @cached_property
    def previous_rows(self) -> tuple[tuple[int, ...], ...]:
        """Rows that must have ended before row s may start on its entry rank (forward); joins have several."""
        previous: list[list[int]] = [[] for _ in range(self.rows)]
        for u in self.units:
            start = self.first_row[u.id]
            last = start + self._module_by_name[u.module].segments - 1
            for s in range(start, last):
                previous[s + 1].append(s)
            for v in u.feeds:
                previous[self.first_row[v]].append(last)
        return tuple(tuple(p) for p in previous)

    @cached_property
    def next_rows(self) -> tuple[tuple[int, ...], ...]:
        """Mirror of :attr:`previous_rows`."""
        following: list[list[int]] = [[] for _ in range(self.rows)]
        for s, previous in enumerate(self.previous_rows):
            for p in previous:
                following[p].append(s)
        return tuple(tuple(n) for n in following)

    @cached_property
    def edges(self) -> Edges:
        """All of :meth:`predecessors`' edges between forwards."""
        ranks, hop = self.ranks, self.hop.tolist()
        into: list[list[tuple[int, float]]] = [[] for _ in range(self.rows * ranks)]
        for s in range(self.rows):
            entry, step = self.entry_rank(s), -1 if self.row_reversed[s] else 1
            into[s * ranks + entry] += [
                (q * ranks + self.exit_rank(q), self.link_hop(q, s)) for q in self.previous_rows[s]
            ]
            for p in range(ranks):
                if p != entry:
                    into[s * ranks + p].append((s * ranks + p - step, hop[s]))
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
        """``[S, P]``: the stage's chunk is trainable."""
        out = np.zeros((self.rows, self.ranks), dtype=np.bool_)
        for s in range(self.rows):
            module = self._module_by_name[self.units[int(self.row_unit[s])].module]
            out[s] = [module.trains(self.segment(s), r) for r in range(self.ranks)]
        return out

    @cached_property
    def has_backward(self) -> NDArray[np.bool_]:
        """``[S, P]``: the stage's chunk or anything before it in the model trains (whatever the batch holds)."""
        reached = trained_before(self.modules)
        out = np.zeros((self.rows, self.ranks), dtype=np.bool_)
        for s in range(self.rows):
            out[s] = reached[self.units[int(self.row_unit[s])].module][self.segment(s)]
        return out | self.has_weight

    def predecessors(self, key: StageKey) -> tuple[StageKey, ...]:
        """The operations that must end before ``key`` may start, other than by the rank's own order.

        F: the previous rank's F; on the entry rank (rank 0; the last rank if the segment is reversed) the F of every
        previous row on its exit rank. B and BW mirror F (the next rank's B; on the exit rank the B of every next row on
        its entry rank) and follow the stage's own F. W follows its own B. ``B`` in the answer stands for whichever of B
        and BW the plan has for that stage.
        """
        s, p = self.row_of(key), key.rank
        step = -1 if self.row_reversed[s] else 1
        if key.kind == Kind.F:
            if p != self.entry_rank(s):
                return (self.key(Kind.F, s, p - step),)
            return tuple(self.key(Kind.F, q, self.exit_rank(q)) for q in self.previous_rows[s])
        if key.kind == Kind.W:
            return (self.key(Kind.B, s, p),)
        own = (self.key(Kind.F, s, p),)
        if p != self.exit_rank(s):
            return (*own, self.key(Kind.B, s, p + step))
        return own + tuple(self.key(Kind.B, n, self.entry_rank(n)) for n in self.next_rows[s])

    # -- views ---------------------------------------------------------------------------------------------------
    @property
    def candidates(self) -> int:
        """C: number of memory strategies."""
        return int(self.forward.shape[0])

    def strategy_name(self, strategy: int, row: int, rank: int) -> str:
        return self.strategies[row][rank][strategy] if self.strategies else "none"

    def project(self, strategy: NDArray[np.int8]) -> StageGraph:
        """The graph with one strategy per stage (``strategy`` is ``[S, P]``), so that C = 1."""
        index = strategy[None].astype(np.int64)

        def pick(array: Floats) -> Floats:
            return np.ascontiguousarray(np.take_along_axis(array, index, axis=0))

        names = tuple(
            tuple((self.strategy_name(int(strategy[s, p]), s, p),) for p in range(self.ranks)) for s in range(self.rows)
        )
        projected = StageGraph(
            self.ranks, self.modules, self.units, pick(self.forward), pick(self.backward), pick(self.weight),
            pick(self.fused), pick(self.activation), pick(self.hold), self.hop, self.static_bytes, self.memory_limit,
            names,
        )  # fmt: skip
        projected.__dict__["edges"] = self.edges  # the structure is the same: not to be worked out again
        return projected
