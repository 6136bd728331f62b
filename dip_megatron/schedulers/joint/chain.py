"""A walk of :mod:`.sequences`, from schedules of replicas that run together and back to such."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.graph import Floats, Ints, OperationGraph
from ...core.order import Schedule
from ...core.simulate.kernels import BACKWARD, FUSED, WEIGHT, GraphArrays, graph_arrays, pad_orders, replay
from ..dip.random import seeded, uniform
from .moves import improve_joint, keep_best
from .packing import make_packing, packed
from .room import make_room
from .sequences import JointProblem, JointSequences, first_over, make_joint_sequences, trace_joint
from .times import all_tails, latest_end
from .together import Together

PASSES, LEAST_GAIN = 8, 5e-4
"""Passes of :mod:`.packing` from the end and back, at most, and what each has to gain for another to follow."""
COOL, COLD = 1e-5, 1e-6
"""Temperature over iteration time, at first and at last."""
KICK_HEAT, KICK_CHANGES = (3e-3, 1.0), (5, 100)
"""Of a kick: temperature over iteration time, and changes tried, each drawn evenly on a scale of powers."""
NEAR = 2e-3
"""From orders that take longer by more than this share once they are packed, no walk goes on."""
LONGER = 2e-4
"""Share by which orders may take longer than those before a kick, in the mean, at first; ever less later."""
FAR = 5 * LONGER
"""Share by which a walk may fall behind its best orders before it goes on from these."""


def make_joint_problem(t: Together) -> JointProblem:
    """Lay out replicas that were put together."""
    x = graph_arrays(*t.graphs, experts=t.experts)
    ranks, rows = t.graph.ranks, t.graph.virtual_microbatches
    member = np.full((len(t.graphs), rows * ranks), -1, dtype=np.int32)
    place_of = np.zeros(x.nodes, dtype=np.int32)
    parts: list[list[Floats]] = [[], [], []]
    lines = [g * ranks + np.tile(np.arange(ranks), h.virtual_microbatches) for g, h in enumerate(t.graphs)]
    for g, (graph, mine) in enumerate(zip(t.graphs, t.rows, strict=True)):
        there = np.flatnonzero(mine >= 0)
        behind = np.zeros(graph.virtual_microbatches, dtype=np.int64)
        behind[mine[there]] = there
        index = np.ascontiguousarray(t.choice[g][:, behind]).astype(np.int64)
        nodes = x.base[g] + mine[there][:, None] * ranks + np.arange(ranks)[None]
        places = there[:, None] * ranks + np.arange(ranks)[None]
        member[g, places.reshape(-1)] = nodes.reshape(-1)
        place_of[nodes.reshape(-1)] = places.reshape(-1)

        def taken(array: Floats, index: NDArray[np.int64] = index) -> Floats:
            return np.take_along_axis(array, index, axis=0).reshape(len(index), -1)

        parts[0].append(np.stack([taken(a) for a in (graph.forward, graph.backward, graph.weight, graph.fused)]))
        parts[1].append(taken(graph.activation))
        parts[2].append(taken(graph.deferred_activation))
    duration = np.ascontiguousarray(np.concatenate(parts[0], axis=2))
    activation, deferred = (np.ascontiguousarray(np.concatenate(part, axis=1)) for part in parts[1:])
    static, limit = (
        np.concatenate([getattr(g, name) for g in t.graphs]).astype(np.float64)
        for name in ("static_bytes", "memory_limit")
    )
    return JointProblem(
        x=x._replace(duration=duration), duration=duration, activation=activation, deferred_activation=deferred,
        has_backward=np.concatenate([g.has_backward.reshape(-1) for g in t.graphs]),
        has_weight=np.concatenate([g.has_weight.reshape(-1) for g in t.graphs]),
        member=member, place_of=place_of, line=np.concatenate(lines).astype(np.int32), static=static, limit=limit,
        bounded=static + _most(t.graphs) > limit,
    )  # fmt: skip


def _most(graphs: Sequence[OperationGraph]) -> Floats:
    """Bytes that each rank of each replica holds if it holds everything."""
    held = [np.maximum(g.activation, g.deferred_activation).max(axis=0).sum(axis=0) for g in graphs]
    return np.asarray(np.concatenate(held), dtype=np.float64)


def joint_codes(x: GraphArrays, schedules: Sequence[Schedule]) -> tuple[Ints, Ints]:
    """The orders of all lines ``[G * P, longest]`` as codes ``kind * N + node``, and their lengths."""
    orders, lengths = pad_orders(*schedules)
    line = np.arange(len(lengths))[:, None]
    kind, row = np.divmod(orders, (np.diff(x.base) // x.ranks)[line // x.ranks])
    return (kind * x.nodes + x.base[line // x.ranks] + row * x.ranks + line % x.ranks).astype(np.int32), lengths


def replica_codes(x: GraphArrays, orders: Ints) -> Ints:
    """Codes of each replica, ``kind * S + s``, for codes ``kind * N + node``."""
    replica = np.arange(len(orders))[:, None] // x.ranks
    kind, node = np.divmod(orders, x.nodes)
    rows = (np.diff(x.base) // x.ranks)[replica]
    return np.asarray(kind * rows + (node - x.base[replica]) // x.ranks, dtype=np.int32)


def split_events(q: JointProblem, orders: Ints, lengths: Ints) -> tuple[Ints, Ints]:
    """The orders with every fused backward of an event split, its weight gradient right after it: the event then lasts
    as long as the longest input gradient, and each replica's weight gradients are its own. Needs room for them."""
    x = q.x
    out, counts = np.zeros_like(orders), lengths.copy()
    for line, length in enumerate(lengths):
        order = orders[line, :length]
        kind, node = np.divmod(order, x.nodes)
        apart = (kind == FUSED) & (x.chunk[node] >= 0)
        place = np.arange(length) + np.cumsum(apart) - apart
        out[line, place] = np.where(apart, BACKWARD * x.nodes + node, order)
        out[line, place[apart] + 1] = WEIGHT * x.nodes + node[apart]
        counts[line] = length + apart.sum()
    return out, counts


def fused_in_shadow(q: JointProblem, orders: Ints, lengths: Ints, strategy: NDArray[np.int8]) -> tuple[Ints, Ints]:
    """The orders with every split backward of an event fused that takes no longer, fused, than the longest member's:
    its weight gradient then costs nothing, and less is held."""
    x = q.x
    nodes = np.arange(x.nodes)
    split = np.zeros(x.nodes, dtype=bool)
    for line, length in enumerate(lengths):
        order = orders[line, :length]
        split[order[order // x.nodes == WEIGHT] % x.nodes] = True
    kind = np.where(split | ~q.has_weight, BACKWARD, FUSED)
    length = q.duration[kind, strategy, nodes]
    longest = np.zeros(q.member.shape[1])
    for members in q.member:
        has = members >= 0
        longest[has] = np.maximum(longest[has], length[members[has]])
    fuse = split & (x.chunk >= 0) & (q.duration[FUSED, strategy, nodes] <= longest[q.place_of])
    out, counts = orders.copy(), lengths.copy()
    for line, n in enumerate(lengths):
        order = orders[line, :n]
        kinds, node = np.divmod(order, x.nodes)
        kept = ~((kinds == WEIGHT) & fuse[node])
        changed = np.where((kinds == BACKWARD) & fuse[node], FUSED * x.nodes + node, order)[kept]
        out[line, : len(changed)] = changed
        counts[line] = len(changed)
    return out, counts


def find_places(q: JointProblem, s: JointSequences) -> list[NDArray[np.int64]]:
    """Note where each operation stands; the numbers of those of each line."""
    out = []
    for line, length in enumerate(s.lengths):
        kind, node = np.divmod(s.orders[line, :length].astype(np.int64), q.x.nodes)
        out.append(np.where(kind == FUSED, BACKWARD, kind) * q.x.nodes + node)
        s.place[out[-1]] = np.arange(length)
    return out


def begin_joint(q: JointProblem, s: JointSequences, random: NDArray[np.uint64]) -> float:
    """Time the orders to start from, and find a longest path; their time."""
    x, lines = q.x, len(s.lengths)
    start, end = np.zeros(s.orders.shape), np.zeros(s.orders.shape)
    time = replay(
        x, replica_codes(x, s.orders), s.lengths, s.strategy, start, end, np.zeros(lines, dtype=np.int32),
        np.zeros(x.nodes), np.zeros(x.nodes),
    )  # fmt: skip
    for line, numbers in enumerate(find_places(q, s)):
        s.start[numbers], s.end[numbers] = start[line, : len(numbers)], end[line, : len(numbers)]
    all_tails(q, s)
    trace_joint(q, s, random)
    return float(time)


def pack(q: JointProblem, s: JointSequences, late: Callable[[], bool] = bool) -> tuple[JointSequences, int]:
    """Orders, of those whose times are in ``s``, with operations moved into gaps, from the end and from the start in
    turns, for as long as that pays and it isn't ``late``; ``s`` itself if it never does. The times are to be found
    anew. And how many orders were made."""
    found, kept, time, made = _copy(s), s, latest_end(q, s), 0
    w = make_packing(q, found)
    while made < 2 * PASSES and not late():
        packed(q, found, w, True)
        packed(q, found, w, False)
        made += 2
        before, now = time, latest_end(q, found)
        fits = all(first_over(q, found, line) < 0 for line in range(len(found.lengths)))
        if fits and now <= time:  # but for the rounding of sums
            kept, time = _copy(found), now
        if now > before * (1.0 - LEAST_GAIN):
            break
    return kept, made


def _copy(s: JointSequences) -> JointSequences:
    copies: list[Any] = [x.copy() for x in s]
    return JointSequences(*copies)


def _best_of(s: JointSequences) -> dict[str, Any]:
    return {name: getattr(s, name) for name in ("best_orders", "best_lengths", "best_strategy")}


class JointChain:
    """One annealing walk over all replicas' orders, stepped in slices. ``made``: orders that packing has made;
    it makes no more once it is ``late``."""

    def __init__(
        self, t: Together, q: JointProblem, schedules: Sequence[Schedule], seed: int, stream: int,
        late: Callable[[], bool] = bool,
    ) -> None:  # fmt: skip
        self.t, self.q, self.random = t, q, seeded(seed, 100 + stream)
        self.values, self.made, self.late = np.zeros(2), 0, late
        self.before: tuple[float, JointSequences] | None = None
        self._start(schedules)

    @property
    def time(self) -> float:
        """Seconds of the best orders."""
        return float(self.values[1])

    def adopt(self, other: JointChain) -> None:
        """Go on from the best that another walk, or this one, has found, on its pairing."""
        schedules = other.schedules()
        self.t, self.q = other.t, other.q
        self._start(schedules)

    def _start(self, schedules: Sequence[Schedule]) -> None:
        """Go on from these schedules of the replicas, as they are or with the backwards of events split, whichever is
        faster once packed; with leaner strategies where they hold too much. Raises ValueError if the leanest do."""
        x = self.q.x
        orders, lengths = joint_codes(x, schedules)
        room = 3 * max(g.virtual_microbatches for g in self.t.graphs)
        wide = np.zeros((len(orders), max(room, orders.shape[1])), dtype=np.int32)
        wide[:, : orders.shape[1]] = orders
        strategy = self._strategies(schedules)
        starts: list[tuple[float, int, JointSequences]] = []
        for start in ((wide, lengths), split_events(self.q, wide, lengths)):
            fused, counts = fused_in_shadow(self.q, start[0], start[1], strategy)
            s = make_joint_sequences(self.q, fused, counts, strategy)
            find_places(self.q, s)
            if make_room(self.q, s):
                begin_joint(self.q, s, self.random)
                s, made = pack(self.q, s, self.late)
                self.made += made
                starts.append((begin_joint(self.q, s, self.random), len(starts), s))
        if not starts:
            raise ValueError("the schedules to start from don't fit in memory")
        self.values[:], _, self.sequences = min(starts, key=lambda entry: entry[:2])
        keep_best(self.sequences)

    def _strategies(self, schedules: Sequence[Schedule]) -> NDArray[np.int8]:
        """The candidates of the graph put together behind the replicas' own, ``[N]``; the first that is the same."""
        out = []
        for g, (schedule, mine) in enumerate(zip(schedules, self.t.rows, strict=True)):
            there = np.flatnonzero(mine >= 0)
            behind = np.zeros(len(schedule.strategy), dtype=np.int64)
            behind[mine[there]] = there
            out.append((self.t.choice[g][:, behind] == schedule.strategy[None]).argmax(axis=0).reshape(-1))
        return np.concatenate(out).astype(np.int8)

    def step(self, progress: float, evaluations: int) -> None:
        """So many moves at the temperature of ``progress`` (0 to 1)."""
        heat = self.time * COOL * (COLD / COOL) ** progress
        improve_joint(self.q, self.sequences, self.random, self.values, heat, evaluations)

    def pack(self) -> None:
        """Move operations of the orders under way into gaps."""
        s, made = pack(self.q, self.sequences, self.late)
        self.made += made
        time = begin_joint(self.q, s, self.random)
        if time > self.values[0]:
            return
        self.sequences, self.values[0] = s, time
        if time < self.values[1]:
            self.values[1] = time
            keep_best(s)

    def kick(self) -> bool:
        """Change the orders by more than moves may, and pack what comes of it: whether it is worth to go on from there,
        with moves, until :meth:`settle`. If not, the orders are as they were."""
        time, best = self.values
        heat, changes = (low * (high / low) ** uniform(self.random) for low, high in (KICK_HEAT, KICK_CHANGES))
        s = _copy(self.sequences)
        improve_joint(self.q, s, self.random, np.array([time, -np.inf]), time * heat, int(changes))
        begin_joint(self.q, s, self.random)
        s, made = pack(self.q, s, self.late)
        self.made += made
        packed = begin_joint(self.q, s, self.random)
        if packed > time * (1.0 + NEAR):
            return False
        self.before, self.sequences, self.values[0] = (time, self.sequences), s, packed
        if packed < best:
            self.values[1] = packed
            keep_best(s)
        return True

    def settle(self, progress: float) -> None:
        """Go on from what came of the last kick if it takes little longer than the orders before it, the less the
        greater the ``progress`` (0 to 1); else from these, or, where they have fallen behind, from the best."""
        assert self.before is not None
        (time, s), self.before = self.before, None
        now, best = self.values
        if now > time * (1.0 - LONGER * (1.0 - progress) * np.log(1.0 - uniform(self.random))):
            self.sequences, self.values[0] = s._replace(**_best_of(self.sequences)), time
        if self.values[0] > best * (1.0 + FAR):
            s = self.sequences
            self.sequences = make_joint_sequences(self.q, s.best_orders, s.best_lengths, s.best_strategy)
            self.values[0] = begin_joint(self.q, self.sequences, self.random)

    def schedules(self) -> list[Schedule]:
        """The best found, as schedules of the replicas."""
        s, x = self.sequences, self.q.x
        out = []
        for g, (graph, mine) in enumerate(zip(self.t.graphs, self.t.rows, strict=True)):
            orders = []
            for p in range(x.ranks):
                line = g * x.ranks + p
                kind, node = np.divmod(s.best_orders[line, : s.best_lengths[line]], x.nodes)
                orders.append((kind * graph.virtual_microbatches + (node - x.base[g]) // x.ranks).astype(np.int32))
            there = np.flatnonzero(mine >= 0)
            behind = np.zeros(graph.virtual_microbatches, dtype=np.int64)
            behind[mine[there]] = there
            chosen = s.best_strategy[x.base[g] : x.base[g + 1]].reshape(graph.virtual_microbatches, x.ranks)
            index = chosen[None].astype(np.int64)
            out.append(Schedule(tuple(orders), np.take_along_axis(self.t.choice[g][:, behind], index, axis=0)[0]))
        return out
