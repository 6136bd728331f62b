"""Local search over the explicit order of every rank, for what no choice of keys expresses.

Moves shift an operation along the longest path of the current schedule (the classical neighbourhood of job shops: only
a change of order on that path can shorten it), shift any operation, or give a stage a faster strategy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.graph import Floats, Ints
from ...core.order import Schedule
from ...core.simulate.compiled import compiled
from ...core.simulate.kernels import BACKWARD, FORWARD, WEIGHT, backward_ready, forward_ready, pad_orders, replay
from .problem import Problem
from .random import below, uniform


class Sequences(NamedTuple):
    """A schedule under way, its times, and the best one. ``orders`` ``[P, L]``, ``strategy`` ``[N]``; ``place``
    ``[2, N]``: where each stage's F and B (or BW) stand; ``arcs`` ``[., 2]``: (rank, position) of operations on the
    longest path that wait for the one before them, ``arc_count`` ``[1]`` of them. ``trial``: times of the schedule
    being tried, from position ``first`` ``[P]`` on; ``ends`` ``[2, N]``: when each stage's F and B (or BW) end."""

    orders: Ints
    lengths: Ints
    strategy: NDArray[np.int8]
    best_orders: Ints
    best_strategy: NDArray[np.int8]
    start: Floats
    end: Floats
    trial_start: Floats
    trial_end: Floats
    ends: Floats
    trial_ends: Floats
    at: Ints
    first: Ints
    place: Ints
    arcs: Ints
    arc_count: Ints


def make_sequences(q: Problem, schedule: Schedule) -> Sequences:
    """A walk that starts from ``schedule``."""
    orders, lengths = pad_orders(schedule)
    nodes = q.graph.virtual_microbatches * q.graph.ranks
    strategy = schedule.strategy.reshape(-1).copy()
    times = [np.zeros(orders.shape) for _ in range(4)]
    return Sequences(
        orders=orders,
        lengths=lengths,
        strategy=strategy,
        best_orders=orders.copy(),
        best_strategy=strategy.copy(),
        start=times[0],
        end=times[1],
        trial_start=times[2],
        trial_end=times[3],
        ends=np.zeros((2, nodes)),
        trial_ends=np.zeros((2, nodes)),
        at=np.zeros(q.graph.ranks, dtype=np.int32),
        first=np.zeros(q.graph.ranks, dtype=np.int32),
        place=np.zeros((2, nodes), dtype=np.int32),
        arcs=np.zeros((orders.size, 2), dtype=np.int32),
        arc_count=np.zeros(1, dtype=np.int32),
    )


@compiled
def fits(q: Problem, p: int, order: Ints, length: int, strategy: NDArray[np.int8]) -> bool:
    """Whether rank ``p`` stays within its capacity."""
    if not q.bounded[p]:
        return True
    virtual_microbatches, ranks = q.graph.virtual_microbatches, q.graph.ranks
    held = 0
    for i in range(length):
        kind = order[i] // virtual_microbatches
        n = (order[i] - kind * virtual_microbatches) * ranks + p
        c = strategy[n]
        if kind == FORWARD:
            held += q.activation[c, n]
        elif kind == WEIGHT:
            held -= q.deferred_activation[c, n]
        else:
            held -= q.activation[c, n]
            if kind == BACKWARD and q.graph.has_weight[n]:
                held += q.deferred_activation[c, n]
        if held > q.capacity[p]:
            return False
        if kind == FORWARD and not q.graph.has_backward[n]:
            held -= q.activation[c, n]
    return True


@compiled
def trace(q: Problem, s: Sequences, random: NDArray[np.uint64]) -> None:
    """Follow one longest path from the end to the start, branching at random; fill ``arcs``."""
    g = q.graph
    virtual_microbatches, ranks = g.virtual_microbatches, g.ranks
    p, latest = 0, -1.0
    for r in range(ranks):
        if s.lengths[r] > 0 and s.end[r, s.lengths[r] - 1] > latest:
            latest = s.end[r, s.lengths[r] - 1]
            p = r
    i = s.lengths[p] - 1
    count = 0
    while i >= 0 and count < len(s.arcs):
        begin = s.start[p, i]
        kind = s.orders[p, i] // virtual_microbatches
        n = (s.orders[p, i] - kind * virtual_microbatches) * ranks + p
        next_p, next_i = -1, -1
        if kind == FORWARD:
            for e in range(g.before_start[n], g.before_start[n + 1]):
                m = g.before[e]
                if s.end[m % ranks, s.place[0, m]] + g.before_transfer[e] == begin:
                    next_p, next_i = m % ranks, s.place[0, m]
        elif kind != WEIGHT:
            for e in range(g.after_start[n], g.after_start[n + 1]):
                m = g.after[e]
                if s.end[m % ranks, s.place[1, m]] + g.after_transfer[e] == begin:
                    next_p, next_i = m % ranks, s.place[1, m]
        if i > 0 and s.end[p, i - 1] == begin and (next_i < 0 or uniform(random) < 0.5):
            s.arcs[count, 0] = p
            s.arcs[count, 1] = i
            count += 1
            i -= 1
        elif next_i >= 0:
            p, i = next_p, next_i
        else:
            break
    s.arc_count[0] = count


@compiled
def shift(order: Ints, source: int, target: int) -> None:
    """Move the operation at ``source`` to ``target``; those between move up by one."""
    code = order[source]
    if target < source:
        for i in range(source, target, -1):
            order[i] = order[i - 1]
    else:
        for i in range(source, target):
            order[i] = order[i + 1]
    order[target] = code


@compiled
def passes_itself(order: Ints, virtual_microbatches: int, source: int, target: int) -> bool:
    """Whether that move would swap two operations of one stage."""
    virtual_microbatch = order[source] % virtual_microbatches
    low, high = min(source, target), max(source, target)
    for i in range(low, high + 1):  # noqa: SIM110 (any() would allocate)
        if i != source and order[i] % virtual_microbatches == virtual_microbatch:
            return True
    return False


@compiled
def settle(q: Problem, s: Sequences, accepted: bool) -> None:
    """After :func:`replay_after`: make the trial's times the current ones, or forget them. The orders must be those
    that were tried."""
    virtual_microbatches, ranks = q.graph.virtual_microbatches, q.graph.ranks
    for r in range(ranks):
        for i in range(s.first[r], s.lengths[r]):
            if accepted:
                s.start[r, i] = s.trial_start[r, i]
                s.end[r, i] = s.trial_end[r, i]
            kind = s.orders[r, i] // virtual_microbatches
            if kind != WEIGHT:
                k, n = 0 if kind == FORWARD else 1, (s.orders[r, i] - kind * virtual_microbatches) * ranks + r
                if accepted:
                    s.ends[k, n] = s.trial_ends[k, n]
                    s.place[k, n] = i
                else:
                    s.trial_ends[k, n] = s.ends[k, n]


@compiled
def begin(q: Problem, s: Sequences, random: NDArray[np.uint64]) -> float:
    """Time the schedule to start from."""
    time = replay(q.graph, s.orders, s.lengths, s.strategy, s.start, s.end, s.at, s.ends[0], s.ends[1])
    for r in range(q.graph.ranks):
        s.first[r] = 0
        for i in range(s.lengths[r]):
            s.trial_start[r, i] = s.start[r, i]
            s.trial_end[r, i] = s.end[r, i]
    for m in range(s.ends.shape[1]):
        s.trial_ends[0, m] = s.ends[0, m]
        s.trial_ends[1, m] = s.ends[1, m]
    settle(q, s, True)
    trace(q, s, random)
    return time


@compiled
def replay_after(q: Problem, s: Sequences, p: int, position: int, limit: float) -> float:
    """The time after a change to rank ``p``'s order from ``position`` on, or to the length of the operation there; nan
    if it deadlocks, inf if it is over ``limit``. What started before that position could start is not touched."""
    g = q.graph
    virtual_microbatches, ranks = g.virtual_microbatches, g.ranks
    duration = g.duration
    since = s.end[p, position - 1] if position > 0 else 0.0
    remaining = 0
    for r in range(ranks):
        low, high = 0, s.lengths[r]
        while low < high:
            middle = (low + high) >> 1
            if s.start[r, middle] < since:
                low = middle + 1
            else:
                high = middle
        if r == p:
            low = position
        s.first[r] = low
        s.at[r] = low
        if low > 0:
            s.trial_end[r, low - 1] = s.end[r, low - 1]
        for i in range(low, s.lengths[r]):
            kind = s.orders[r, i] // virtual_microbatches
            if kind != WEIGHT:
                s.trial_ends[
                    0 if kind == FORWARD else 1, (s.orders[r, i] - kind * virtual_microbatches) * ranks + r
                ] = np.nan
        remaining += s.lengths[r] - low
    forward_end, backward_end = s.trial_ends[0], s.trial_ends[1]
    while remaining > 0:
        progressed = False
        for r in range(ranks):
            i = s.at[r]
            clock = s.trial_end[r, i - 1] if i > 0 else 0.0
            while i < s.lengths[r]:
                code = s.orders[r, i]
                kind = code // virtual_microbatches
                n = (code - kind * virtual_microbatches) * ranks + r
                ready = clock
                if kind == FORWARD:
                    ready = forward_ready(g, n, forward_end, ready)
                elif kind != WEIGHT:
                    # Its own F and, for a W, its own B come earlier in this very order.
                    ready = backward_ready(g, n, backward_end, ready)
                if np.isnan(ready):
                    break
                clock = ready + duration[kind, s.strategy[n], n]
                s.trial_start[r, i] = ready
                s.trial_end[r, i] = clock
                if kind != WEIGHT:
                    s.trial_ends[0 if kind == FORWARD else 1, n] = clock
                i += 1
                remaining -= 1
                progressed = True
            s.at[r] = i
            if clock > limit:
                return np.inf
        if not progressed:
            return np.nan
    latest = 0.0
    for r in range(ranks):
        i = s.lengths[r] - 1
        if i >= 0:
            latest = max(latest, s.trial_end[r, i] if i >= s.first[r] else s.end[r, i])
    return latest


@compiled
def improve(
    q: Problem, s: Sequences, random: NDArray[np.uint64], values: Floats, heat: float, evaluations: int
) -> None:
    """``evaluations`` moves of annealing at temperature ``heat`` (seconds); ``values`` ``[2]`` are the times of the
    schedule under way and of the best."""
    virtual_microbatches, ranks = q.graph.virtual_microbatches, q.graph.ranks
    for _ in range(evaluations):
        kind = uniform(random)
        p, source, target, n, old = -1, 0, 0, -1, np.int8(0)
        if kind < 0.15 and q.graph.candidates > 1:
            n = below(random, len(s.strategy))
            old = s.strategy[n]
            if old == 0:
                continue
            p = n % ranks
            s.strategy[n] = below(random, int(old))
        else:
            if kind < 0.85 and s.arc_count[0] > 0:
                arc = below(random, s.arc_count[0])
                p, source = s.arcs[arc, 0], s.arcs[arc, 1]
                steps = 1 + below(random, 4)
                if uniform(random) < 0.5:
                    target = source - steps
                else:
                    source -= 1
                    target = source + steps
            else:
                p = below(random, ranks)
                source = below(random, s.lengths[p])
                target = source + below(random, 13) - 6
            target = max(0, min(s.lengths[p] - 1, target))
            if source == target or passes_itself(s.orders[p], virtual_microbatches, source, target):
                continue
            shift(s.orders[p], source, target)
        accepted = False
        if fits(q, p, s.orders[p], s.lengths[p], s.strategy):
            limit = values[0] - heat * np.log(1.0 - uniform(random))
            time = replay_after(q, s, p, s.place[0, n] if n >= 0 else min(source, target), limit)
            accepted = time <= limit
            settle(q, s, accepted)
        if accepted:
            values[0] = time
            trace(q, s, random)
            if time < values[1]:
                values[1] = time
                for r in range(ranks):
                    for i in range(s.lengths[r]):
                        s.best_orders[r, i] = s.orders[r, i]
                for m in range(len(s.strategy)):
                    s.best_strategy[m] = s.strategy[m]
        elif n >= 0:
            s.strategy[n] = old
        else:
            shift(s.orders[p], target, source)
