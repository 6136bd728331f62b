"""Coupled replicas as one problem: the graph that has, in every place, the most that any of them has.

A schedule of that graph is one of every replica, once what a replica doesn't have is left out: all meet in the same
order, each holds no more than the graph says, and orders that end together end with gaps in them, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import CouplingError
from ...core.experts import ExpertLayers, repeated
from ...core.graph import PER_STRATEGY, Floats, OperationGraph
from ...core.modules import Unit
from ...core.order import Schedule
from .pairing import Slots

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Together:
    """``graph``, the maxima of ``graphs`` whose microbatches meet as ``slots`` says. ``rows[g]`` ``[S]``: the virtual
    microbatch of replica g behind each of the graph's, -1 where it has none. ``choice[g]`` ``[C, S, P]``: the replica's
    memory strategy behind each of the graph's."""

    graphs: tuple[OperationGraph, ...]
    experts: ExpertLayers
    slots: Slots
    graph: OperationGraph
    rows: tuple[Rows, ...]
    choice: NDArray[np.int8]

    @property
    def meets(self) -> NDArray[np.bool_]:
        """``[S, P]`` of the graph."""
        return self.experts.meets(self.graph)

    def mean(self, *, seconds: bool, held: bool) -> Together:
        """The same with what the replicas have in the mean, as a replica has the most in some places only. ``seconds``:
        what isn't run together takes the mean. ``held``: a stage holds the mean, but a rank as much as that of the
        replica that holds the most; its schedules may hold too much for a replica."""
        changed: dict[str, Any] = {}
        for name in ("activation", "deferred_activation") if held else ():
            each = self._each(name)
            mean = each.mean(axis=0)
            most, of_mean = each[:, 0].sum(axis=1).max(axis=0), mean[0].sum(axis=0)
            scaled = mean * (most / np.where(of_mean > 0.0, of_mean, 1.0))
            changed[name] = np.minimum(getattr(self.graph, name), scaled)
        for name in ("forward", "backward", "weight", "fused") if seconds else ():
            changed[name] = np.where(self.meets, getattr(self.graph, name), self._each(name).mean(axis=0))
        return replace(self, graph=replace(self.graph, **changed))

    def _each(self, name: str) -> Floats:
        """What each replica has ``[replica, C, S, P]`` at the graph's places; 0 where it has none."""
        parts = zip(self.graphs, self.rows, self.choice, strict=True)
        return np.stack([_taken(getattr(graph, name), rows, choice) for graph, rows, choice in parts])

    def schedules(self, schedule: Schedule) -> list[Schedule]:
        """A schedule of the graph as one of each replica."""
        rows, out = self.graph.virtual_microbatches, []
        index = schedule.strategy[None].astype(np.int64)
        for g, (graph, mine) in enumerate(zip(self.graphs, self.rows, strict=True)):
            orders = []
            for order in schedule.orders:
                kind, row = np.divmod(order, rows)
                there = mine[row] >= 0
                orders.append((kind[there] * graph.virtual_microbatches + mine[row[there]]).astype(np.int32))
            strategy = np.zeros((graph.virtual_microbatches, graph.ranks), dtype=np.int8)
            has = mine >= 0
            strategy[mine[has]] = np.take_along_axis(self.choice[g], index, axis=0)[0][has]
            out.append(Schedule(tuple(orders), strategy))
        return out


def together(graphs: Sequence[OperationGraph], experts: ExpertLayers, slots: Slots) -> Together:
    """Put replicas together. Raises CouplingError where they differ in what must be alike: ranks, modules, how many
    units of modules with experts a pair of microbatches has, which backwards there are."""
    first = graphs[0]
    for g, graph in enumerate(graphs):
        if graph.ranks != first.ranks or graph.modules != first.modules:
            raise CouplingError(
                "size", f"replica {g} has other ranks or chunks than replica 0: they can't run together"
            )
    names = [m.name for m in first.modules]
    with_experts = {name for name, rows in experts.modules if any(any(any(c) for c in row) for row in rows)}
    mine = [_by_place(graph) for graph in graphs]
    units: list[Unit] = []
    source: list[list[int]] = [[] for _ in graphs]
    links: list[set[int]] = []
    for k in range(slots.shape[1]):
        number: dict[tuple[str, int], int] = {}
        found = [[mine[g].get((int(slots[g, k]), name), []) for name in names] for g in range(len(graphs))]
        for i, name in enumerate(names):
            counts = [len(f[i]) for f in found]
            if name in with_experts and len(set(counts)) > 1:
                raise CouplingError(
                    "size", f"slot {k}: replicas have {sorted(set(counts))} units of {name}, which meet"
                )
            for j in range(max(counts)):
                number[name, j] = len(units)
                units.append(Unit(len(units), name, k, j))
                links.append(set())
                for g, f in enumerate(found):
                    source[g].append(f[i][j] if j < len(f[i]) else -1)
        for g, f in enumerate(found):
            place = {u: (name, j) for name, members in zip(names, f, strict=True) for j, u in enumerate(members)}
            for u, where in place.items():
                for v in graphs[g].units[u].downstream:
                    links[number[where]].add(number[place[v]])
    units = [replace(u, downstream=tuple(sorted(to))) for u, to in zip(units, links, strict=True)]
    segments = [first.module(u.module).segments for u in units]
    rows = []
    for g, graph in enumerate(graphs):
        start = np.array([graph.first_virtual_microbatch[u] if u >= 0 else -1 for u in source[g]])
        step = np.concatenate([np.arange(n) for n in segments])
        begin = np.repeat(start, segments)
        rows.append(np.where(begin >= 0, begin + step, -1))
    return _priced(tuple(graphs), experts, slots, tuple(units), tuple(rows))


def _by_place(graph: OperationGraph) -> dict[tuple[int, str], list[int]]:
    """Units of each microbatch and module, in their order."""
    out: dict[tuple[int, str], list[int]] = {}
    for u in graph.units:
        out.setdefault((u.microbatch, u.module), []).append(u.id)
    return out


def _priced(
    graphs: tuple[OperationGraph, ...],
    experts: ExpertLayers,
    slots: Slots,
    units: tuple[Unit, ...],
    rows: tuple[Rows, ...],
) -> Together:
    first, total = graphs[0], len(rows[0])
    ranks = first.ranks
    blank: dict[str, Any] = dict.fromkeys(PER_STRATEGY, np.zeros((1, total, ranks)))
    shape = OperationGraph(
        ranks=ranks, modules=first.modules, units=units, transfer=np.zeros(total), static_bytes=np.zeros(ranks),
        memory_limit=np.full(ranks, np.inf), overhead=first.overhead, **blank,
    )  # fmt: skip
    choice = _choices(graphs, experts, shape, rows)
    count = choice.shape[1]
    arrays: dict[str, Floats] = {}
    for name in PER_STRATEGY:
        most = np.zeros((count, total, ranks))
        for g, graph in enumerate(graphs):
            np.maximum(most, _taken(getattr(graph, name), rows[g], choice[g]), out=most)
        arrays[name] = most
    sizes = np.stack([_taken(g.activation, r, c) for g, r, c in zip(graphs, rows, choice, strict=True)])
    arrays, choice = _fastest_first(arrays, choice, sizes)
    transfer = np.zeros(total)
    for g, graph in enumerate(graphs):
        np.maximum(transfer, np.where(rows[g] >= 0, graph.transfer[rows[g]], 0.0), out=transfer)
    changed: dict[str, Any] = {
        **arrays, "transfer": transfer, "static_bytes": np.maximum.reduce([g.static_bytes for g in graphs]),
        "memory_limit": np.minimum.reduce([g.memory_limit for g in graphs]),
    }  # fmt: skip
    graph = replace(shape, **changed)
    return Together(graphs, experts, slots, graph, rows, choice)


def _taken(array: Floats, rows: Rows, choice: NDArray[np.int8]) -> Floats:
    """``array`` ``[c, s, P]`` of a replica at the graph's places and strategies; 0 where it has none."""
    ranks = np.arange(array.shape[2])[None, None]
    taken = array[choice.astype(np.int64), np.maximum(rows, 0)[None, :, None], ranks]
    return np.where((rows >= 0)[None, :, None], taken, 0.0)


def _choices(
    graphs: tuple[OperationGraph, ...], experts: ExpertLayers, shape: OperationGraph, rows: tuple[Rows, ...]
) -> NDArray[np.int8]:
    """``[replica, C, S, P]``: strategies that may stand together. Where replicas meet, those that repeat the same
    collectives: per set of repeated layers each replica's fastest and each one's leanest; elsewhere the c-th ones."""
    most = max(g.candidates for g in graphs)
    count = len(graphs)
    plain = np.stack([np.minimum(np.arange(most), g.candidates - 1) for g in graphs])
    out = np.broadcast_to(plain[:, :, None, None], (count, most, *shape.forward.shape[1:])).astype(np.int8)
    if most == 1:
        return out
    flags = dict(experts.modules)
    known: dict[object, NDArray[np.int8]] = {}
    meets = experts.meets(shape)
    for s, p in zip(*np.nonzero(meets), strict=True):
        unit = shape.units[int(shape.unit_of[s])]
        chunk = flags[unit.module][shape.segment(int(s))][p]
        names = tuple(
            g.strategies[r[s]][p] if g.strategies else ("none",) * g.candidates
            for g, r in zip(graphs, rows, strict=True)
        )
        key = (chunk, names)
        if key not in known:
            known[key] = _alike(chunk, names, experts.repeating, most)
        out[:, :, s, p] = known[key]
    return out


def _alike(
    chunk: tuple[bool, ...], names: tuple[tuple[str, ...], ...], repeating: frozenset[str], most: int
) -> NDArray[np.int8]:
    """``[replica, C]``: see :func:`_choices`. Raises CouplingError if nothing may stand together."""
    sets: list[dict[int, list[int]]] = []
    for mine in names:
        by_set: dict[int, list[int]] = {}
        for c, text in enumerate(mine):
            by_set.setdefault(repeated(chunk, text, repeating), []).append(c)
        sets.append(by_set)
    common = [key for key in sets[0] if all(key in s for s in sets)]
    if not common:
        raise CouplingError("recompute", "no memory strategies of the replicas repeat the same collectives of a chunk")
    lines = [[s[key][0] for s in sets] for key in common]
    leanest = [[s[key][-1] for s in sets] for key in common]
    lines = [line for pair in zip(lines, leanest, strict=True) for line in pair]
    kept: list[list[int]] = []
    for line in sorted(lines, key=max):
        if line not in kept:
            kept.append(line)
    if len(kept) > most:  # both ends, and the middle evenly
        kept = [kept[i] for i in np.unique(np.linspace(0, len(kept) - 1, most).round().astype(int))]
    return np.array((kept + kept[-1:] * most)[:most], dtype=np.int8).T


def _fastest_first(
    arrays: dict[str, Floats], choice: NDArray[np.int8], sizes: Floats
) -> tuple[dict[str, Floats], NDArray[np.int8]]:
    """Candidates sorted by seconds, those that are leaner in no replica (``sizes`` ``[replica, C, S, P]`` bytes) than a
    faster one replaced by it."""
    order = np.argsort(arrays["forward"] + arrays["fused"], axis=0, kind="stable")
    for c in range(1, len(order)):
        here, before = (np.take_along_axis(sizes, order[None, i : i + 1], axis=1) for i in (c, c - 1))
        order[c] = np.where((here >= before).all(axis=0)[0], order[c - 1], order[c])
    out = {name: np.take_along_axis(array, order, axis=0) for name, array in arrays.items()}
    return out, np.stack([np.take_along_axis(c, order, axis=0) for c in choice])


def leanest(t: Together) -> list[NDArray[np.int8]]:
    """For each replica the strategies ``[S, P]`` that hold the least: where replicas meet, of those that may stand
    together."""
    sizes = np.stack([_taken(g.activation, r, c) for g, r, c in zip(t.graphs, t.rows, t.choice, strict=True)])
    index = sizes.sum(axis=0).argmin(axis=0)[None]
    meets, out = t.meets, []
    for g, (graph, rows) in enumerate(zip(t.graphs, t.rows, strict=True)):
        own = graph.activation.argmin(axis=0).astype(np.int8)
        there = np.flatnonzero(rows >= 0)
        shared = np.take_along_axis(t.choice[g], index, axis=0)[0]
        own[rows[there]] = np.where(meets[there], shared[there], own[rows[there]])
        out.append(own)
    return out
