"""A proven lower bound on the iteration time of every plan of an operation graph, and of graphs that run together.

Notation: for each stage the least forward ``f``, the least input gradient ``b`` (or fused backward, if that is shorter)
and the least whole backward ``t`` over all memory strategies, each minimum on its own; ``w = t - b``. Every plan spends
at least f, b and w on a stage, b not before F is done and w not before b is, whether its backward is split or fused and
whatever its strategies are; so a bound of the relaxed problem with these durations, in which ranks may interrupt
operations, holds for every plan. Without ``split`` (no plan splits a backward) b = t and w = 0.

Four bounds, each valid by itself; the largest is returned.

1. *Critical path, heads and tails.* The head of an operation is the longest path that must end before it starts, its
   tail the longest that must follow its end. Where paths join, everything that precedes has to run on its rank one
   after another: for each rank, Jackson's preemptive one-machine bound over the predecessors, with their paths to the
   join as tails, raises the head (tails: the same on the graph turned round). Then, per rank, Jackson's bound over all
   of its operations: each starts no earlier than its head, and the plan ends no earlier than its end plus its tail;
   preemptive scheduling by largest tail is optimal for that relaxation.

2. *Filling the pipeline.* Before a rank's first operations of some kind arrive it runs others only, and loses time if
   these are too few; without split backwards the same holds for the drain. See :mod:`.fill_bounds`.

3. *Memory.* Call lost, in an interval, the time of a rank that the least durations of what it runs there don't account
   for; losses in disjoint intervals add up, and a rank's time is at least its losses plus all its work. Before a rank's
   first input gradient arrives it runs forwards only and holds them all. For any price x >= 0 of a byte, forwards that
   fit in the capacity A do work of at most x A + sum over stages of max(0, max over strategies of f - x bytes); what
   that leaves up to the least head of an input gradient is lost. Likewise after the last forward: the rank works off
   what it holds, but the plan takes the least tail of a forward. Where all forwards don't fit at once, the first
   backward comes before the last forward and both losses add. Alone, the first argument may also charge each forward
   run early for the longer backward of its strategy, and the second each backward run late for the longer forward.

4. *Bytes held over time.* A stage holds its activations from the start of its forward to the end of its backward: at
   least for both of these and the way there and back between them, h(c) byte-seconds under strategy c (and what waits
   for a weight gradient as long as that takes). All of a rank's are held between its least head and its least tail
   before the end, within the capacity A: the sum of h is at most A (T - head - tail). And T is at least the sum of what
   the stages take, d(c), plus the losses of argument 2, in which forwards alone run. For any price x >= 0 of a
   byte-second T (1 + x A) is at least losses + x A (head + tail) + the sum over stages of min over c of d(c) + x h(c).
   A second form knows that memory takes time to fill and to drain; see :mod:`.lifetimes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .coupled_bounds import Bounded, seconds_where_replicas_meet
from .experts import NO_EXPERTS, ExpertLayers
from .fill_bounds import idle_of_filling, idle_of_first_wave
from .graph import Floats, Ints, OperationGraph
from .lifetimes import held_memory
from .simulate.compiled import compiled
from .simulate.kernels import BACKWARD, FORWARD, FUSED, WEIGHT, GraphArrays, graph_arrays


@compiled
def _one_machine(
    count: int, which: Ints, head: Floats, length: Floats, tail: Floats, left: Floats, done: Ints
) -> float:
    """Jackson's preemptive bound: operations ``which[:count]`` on one machine, always the released one with the largest
    tail. ``left`` and ``done`` are buffers of the same length. O(count^2)."""
    finished = 0
    latest = 0.0
    time = np.inf
    for i in range(count):
        left[i] = length[which[i]]
        done[i] = 0
        time = min(time, head[which[i]])
    while finished < count:
        best = -1
        upcoming = np.inf
        for i in range(count):
            if done[i] == 0:
                if head[which[i]] <= time:
                    if best < 0 or tail[which[i]] > tail[which[best]]:
                        best = i
                else:
                    upcoming = min(upcoming, head[which[i]])
        if best < 0:
            time = upcoming
        elif time + left[best] <= upcoming:
            time += left[best]
            done[best] = 1
            finished += 1
            latest = max(latest, time + tail[which[best]])
        else:
            # Only a newly released operation can change who runs.
            left[best] -= upcoming - time
            time = upcoming
    return latest


@compiled
def _heads(
    order: Ints, into_start: Ints, into: Ints, delay: Floats, length: Floats, rank: Ints, ranks: int,
    join: NDArray[np.bool_], head: Floats, distance: Floats, which: Ints, left: Floats, done: Ints, stack: Ints,
) -> None:  # fmt: skip
    """Heads of all operations in topological ``order``. At a ``join`` everything before it on each rank counts."""
    for index in range(len(order)):
        o = order[index]
        best = 0.0
        for e in range(into_start[o], into_start[o + 1]):
            a = into[e]
            best = max(best, head[a] + length[a] + delay[e])
        if join[o]:
            # Longest paths from every predecessor's end to o, by walking the order backwards.
            count = 0
            distance[o] = -length[o]
            for back in range(index, -1, -1):
                a = order[back]
                if distance[a] == -np.inf:
                    continue
                stack[count] = a
                count += 1
                for e in range(into_start[a], into_start[a + 1]):
                    c = into[e]
                    distance[c] = max(distance[c], distance[a] + length[a] + delay[e])
            for p in range(ranks):
                chosen = 0
                for i in range(1, count):
                    if rank[stack[i]] == p:
                        which[chosen] = stack[i]
                        chosen += 1
                best = max(best, _one_machine(chosen, which, head, length, distance, left, done))
            for i in range(count):
                distance[stack[i]] = -np.inf
        head[o] = best


def _relaxed(g: GraphArrays, split: bool) -> tuple[Floats, Floats, Floats, Floats]:
    """Least f, b and w of every node ``[N]``; and its whole backward by strategy ``[C, N]``."""
    f, b, w, fused = (g.duration[k] for k in (FORWARD, BACKWARD, WEIGHT, FUSED))
    whole = np.where(g.has_weight, np.minimum(b + w, fused) if split else fused, b)
    part = np.where(g.has_weight, np.minimum(b, fused) if split else fused, b)
    least_whole = np.where(g.has_backward, whole.min(axis=0), 0.0)
    least_part = np.where(g.has_backward, part.min(axis=0), 0.0)
    return f.min(axis=0), least_part, np.maximum(least_whole - least_part, 0.0), whole


class _Operations:
    """The operations F, B, W of all nodes (numbers n, N + n, 2N + n) as one graph with delays."""

    def __init__(self, g: GraphArrays, f: Floats, b: Floats, w: Floats) -> None:
        nodes = g.virtual_microbatches * g.ranks
        self.length = np.concatenate([f, b, w])
        self.rank = np.tile(np.arange(nodes, dtype=np.int32) % g.ranks, 3)
        source = np.repeat(np.arange(nodes), np.diff(g.after_start))
        live = g.has_backward[source]
        held = np.flatnonzero(g.has_backward)
        start = np.concatenate([source, nodes + g.after[live], held, nodes + held])
        end = np.concatenate([g.after, nodes + source[live], nodes + held, 2 * nodes + held])
        delay = np.concatenate([g.after_transfer, g.after_transfer[live], np.zeros(2 * len(held))])
        self.count = 3 * nodes
        self.forward = self._lists(start, end, delay)
        self.backward = self._lists(end, start, delay)
        self.order = self._topological(start, end)
        crossing = np.concatenate(
            [np.ones(len(source) + int(live.sum()), dtype=bool), np.zeros(2 * len(held), dtype=bool)]
        )
        self.joins = np.bincount(end[crossing], minlength=self.count) > 1
        self.forks = np.bincount(start[crossing], minlength=self.count) > 1

    def _lists(self, start: NDArray[np.int64], end: NDArray[np.int64], delay: Floats) -> tuple[Ints, Ints, Floats]:
        by_end = np.argsort(end, kind="stable")
        first = np.concatenate([[0], np.cumsum(np.bincount(end, minlength=self.count))])
        return first.astype(np.int32), start[by_end].astype(np.int32), delay[by_end]

    def _topological(self, start: NDArray[np.int64], end: NDArray[np.int64]) -> Ints:
        outgoing, to, _ = self.backward
        waiting = np.bincount(end, minlength=self.count)
        order = np.empty(self.count, dtype=np.int32)
        _topological_order(outgoing, to, waiting, order)
        return order

    def heads(self, turned: bool) -> Floats:
        """Heads, or tails if the graph is ``turned`` round."""
        into_start, into, delay = self.backward if turned else self.forward
        order = np.ascontiguousarray(self.order[::-1]) if turned else self.order
        joins = self.forks if turned else self.joins
        head = np.zeros(self.count)
        ints = [np.zeros(self.count, dtype=np.int32) for _ in range(3)]
        _heads(
            order, into_start, into, delay, self.length, self.rank, int(self.rank.max()) + 1, joins, head,
            np.full(self.count, -np.inf), ints[0], np.zeros(self.count), ints[1], ints[2],
        )  # fmt: skip
        return head


@compiled
def _topological_order(outgoing: Ints, to: Ints, waiting: NDArray[np.int64], order: Ints) -> None:
    """Kahn's order of a graph; ``waiting`` are the numbers of incoming edges and is used up."""
    last = 0
    for o in range(len(order)):
        if waiting[o] == 0:
            order[last] = o
            last += 1
    first = 0
    while first < last:
        o = order[first]
        first += 1
        for e in range(outgoing[o], outgoing[o + 1]):
            waiting[to[e]] -= 1
            if waiting[to[e]] == 0:
                order[last] = to[e]
                last += 1


def lower_bound(*graphs: OperationGraph, experts: ExpertLayers = NO_EXPERTS, split: bool = True) -> float:
    """Seconds below which no plans of the replicas can be, whatever their orders and memory strategies, and whatever
    meets; see the module for the proof, and :mod:`.coupled_bounds` for what meeting adds to it.

    Args:
        graphs: One graph a replica.
        experts: The layers in which the replicas meet.
        split: Whether plans may split backwards.

    Raises:
        ValueError: If replicas have different numbers of operations of a chunk with experts.
    """
    alone = [bounded(graph, split=split) for graph in graphs]
    bound = max(x.seconds for x in alone)
    return max(bound, seconds_where_replicas_meet(graphs, experts, alone)) if experts.modules else bound


def bounded(graph: OperationGraph, *, split: bool = True) -> Bounded:
    """The bound of one replica, see :class:`.coupled_bounds.Bounded`."""
    g = graph_arrays(graph)
    virtual_microbatches, ranks = g.virtual_microbatches, g.ranks
    f, b, w, whole = _relaxed(g, split)
    operations = _Operations(g, f, b, w)
    head, tail = operations.heads(turned=False), operations.heads(turned=True)
    real = np.concatenate([~graph.is_idle.reshape(-1), g.has_backward, g.has_backward & (w > 0)])
    bound = float((head + operations.length + tail)[real].max())
    buffers = np.zeros(operations.count), np.zeros(operations.count, dtype=np.int32)
    for p in range(ranks):
        which = np.flatnonzero(real & (operations.rank == p)).astype(np.int32)
        bound = max(bound, _one_machine(len(which), which, head, operations.length, tail, *buffers))
    per_rank = tuple(x.reshape(virtual_microbatches, ranks) for x in (f, b, w))
    work = sum(per_rank, np.zeros((virtual_microbatches, ranks))).sum(axis=0)
    least_tail = np.array([tail[real & (operations.rank == p)].min() for p in range(ranks)])
    filling, draining = idle_of_filling(graph, per_rank, split)
    wave = idle_of_first_wave(graph, f, head, real)
    filling = np.maximum(filling, wave)
    early, late, both = _memory(graph, g, (f, b, w), whole, head, tail)
    start, end = np.maximum(filling, early[0]), np.maximum(least_tail, np.maximum(draining, late[0]))
    lost = np.maximum(filling + end, start + np.maximum(least_tail, draining))
    lost = np.maximum(lost, np.maximum(early[1] + least_tail, late[1]))
    lost = np.where(both, np.maximum(lost, start + end), lost)
    nodes = virtual_microbatches * ranks
    order = operations.order[operations.order < nodes]
    # Sums of floats: stay on the safe side of rounding.
    seconds = max(bound, float((work + lost).max())) * (1.0 - 1e-12)
    idle = np.stack([filling, least_tail])
    held = held_memory(graph, g, order, (f, b), whole, head[:nodes], idle, seconds, split=split)
    seconds = max(seconds, float(held.max()) * (1.0 - 1e-12))
    return Bounded(seconds, per_rank[0], per_rank[1], per_rank[2], filling, wave, least_tail)


def _memory(
    graph: OperationGraph, g: GraphArrays, least: Sequence[Floats], whole: Floats, head: Floats, tail: Floats
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Argument 3: time lost before the first backward and after the last forward, each ``[2, P]``: as losses that add
    up, and with charges for strategies, alone; and whether both add up ``[P]``."""
    ranks, nodes = g.ranks, g.virtual_microbatches * g.ranks
    early, late, both = np.zeros((2, ranks)), np.zeros((2, ranks)), np.zeros(ranks, dtype=np.bool_)
    f, b, w = least
    for p in range(ranks):
        room = float(graph.memory_limit[p] - graph.static_bytes[p])
        n = np.arange(p, nodes, ranks)[~graph.is_idle[:, p]]
        if not np.isfinite(room) or not g.has_backward[n].all():
            continue
        size, deferred_activation = g.activation[:, n], g.deferred_activation[:, n]
        rest = b[n] + w[n]
        both[p] = size.min(axis=0).sum() > room
        nothing = np.zeros((1, len(n)))
        for i in range(2):
            done = _worth(f[n] - i * (whole[:, n] - rest), size, nothing, nothing, room)
            early[i, p] = max(0.0, float(head[nodes + n].min()) - done)
            done = _worth(
                rest - i * (g.duration[FORWARD][:, n] - f[n]),
                size,
                w[n] + 0 * deferred_activation,
                deferred_activation,
                room,
            )
            late[i, p] = max(0.0, float(tail[n].min()) - done)
    return early, late, both


def _worth(gain: Floats, size: Floats, other_gain: Floats, other_size: Floats, room: float) -> float:
    """Upper bound on the gain of any choice within ``room`` bytes of one strategy, in one of two ways, for each stage
    (gains ``[C, n]`` seconds): the best of some prices of a byte."""

    def laid_out(values: Floats) -> Floats:  # one layout of arrays, so that the kernel is compiled once
        return np.array(np.broadcast_to(values, size.shape), order="C")

    gain = laid_out(gain)
    ratio = np.sort(np.maximum(gain.max(axis=0) / np.maximum(size.min(axis=0), 1e-9), 0.0))
    quantiles = np.interp(np.linspace(0.0, len(ratio) - 1.0, 17), np.arange(len(ratio)), ratio)
    prices = np.concatenate([[0.0], quantiles])
    return _least_worth(prices, gain, laid_out(size), laid_out(other_gain), laid_out(other_size), room)


@compiled
def _least_worth(
    prices: Floats, gain: Floats, size: Floats, other_gain: Floats, other_size: Floats, room: float
) -> float:
    """Over ``prices``: what ``room`` costs, and what every stage gains at most beyond the price of its bytes."""
    least = np.inf
    for price in prices:
        worth = price * room
        for n in range(size.shape[1]):
            best = 0.0
            for c in range(size.shape[0]):
                best = max(best, gain[c, n] - price * size[c, n], other_gain[c, n] - price * other_size[c, n])
            worth += best
        least = min(least, worth)
    return float(least)
