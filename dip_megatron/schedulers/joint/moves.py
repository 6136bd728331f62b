"""Local search over the explicit orders of all coupled replicas.

As :mod:`..dip.sequences`, with what coupling allows: an operation of a replica's own (encoders, stages without experts,
weight gradients) moves in that replica; two events of a rank change places in all of them; a backward is split or
fused, and a stage gets a faster strategy, in one replica (a stage with experts: in all).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...core.graph import Floats, Ints
from ...core.simulate.compiled import compiled
from ...core.simulate.kernels import BACKWARD, FORWARD, FUSED, WEIGHT
from ..dip.random import below, uniform
from ..dip.sequences import shift
from .sequences import (
    JointProblem,
    JointSequences,
    is_event,
    line_fits,
    replay_from,
    restore,
    settle,
    trace_joint,
)

ARC, ANY, SPLIT, LEAN = 0.70, 0.80, 0.92, 1.0
"""Shares of the moves, added up: along the longest path, of any operation, of a split, of a strategy."""


@compiled
def blocked(q: JointProblem, order: Ints, source: int, target: int) -> int:
    """What a move of one operation would pass: 1 another operation of its own stage, 2 an event though it is one
    itself, else 0."""
    n, event = order[source] % q.x.nodes, is_event(q, order[source])
    low, high = min(source, target), max(source, target)
    for i in range(low, high + 1):
        if i == source:
            continue
        if order[i] % q.x.nodes == n:
            return 1
        if event and is_event(q, order[i]):
            return 2
    return 0


@compiled
def swap_events(q: JointProblem, s: JointSequences, line: int, i: int, later: bool) -> float:
    """Exchange the event at place ``i`` of a line with the event after it (before it, unless ``later``) in all
    replicas; since when that changes anything, or -1 if it can't be done."""
    x = q.x
    step = 1 if later else -1
    j = i + step
    while 0 <= j < s.lengths[line] and not is_event(q, s.orders[line, j]):
        j += step
    if not 0 <= j < s.lengths[line]:
        return -1.0
    first, second = min(i, j), max(i, j)
    a, b = s.orders[line, first], s.orders[line, second]
    a_node, b_node = q.place_of[a % x.nodes], q.place_of[b % x.nodes]
    a_kind, b_kind = 0 if a // x.nodes == FORWARD else 1, 0 if b // x.nodes == FORWARD else 1
    since = np.inf
    for g in range(x.replicas):
        other = g * x.ranks + line % x.ranks
        low, high = s.place[a_kind, q.member[g, a_node]], s.place[b_kind, q.member[g, b_node]]
        source, target = (low, high) if later else (high, low)
        if blocked(q, s.orders[other], source, target) == 1:
            for h in range(g):
                restore(s, h * x.ranks + line % x.ranks)
            return -1.0
        shift(s.orders[other], source, target)
        since = min(since, s.end[other, low - 1] if low > 0 else 0.0)
    return since


@compiled
def toggle_split(q: JointProblem, s: JointSequences, n: int, line: int, distance: int) -> float:
    """Split the backward of a stage, its weight gradient ``distance`` places after it, or fuse it; since when that
    changes anything."""
    i = s.place[1, n]
    if s.orders[line, i] // q.x.nodes == FUSED:
        target = min(s.lengths[line], i + 1 + distance)
        for j in range(s.lengths[line], target, -1):
            s.orders[line, j] = s.orders[line, j - 1]
        s.orders[line, target] = WEIGHT * q.x.nodes + n
        s.orders[line, i] = BACKWARD * q.x.nodes + n
        s.lengths[line] += 1
    else:
        j = i + 1
        while s.orders[line, j] != WEIGHT * q.x.nodes + n:
            j += 1
        s.lengths[line] -= 1
        for k in range(j, s.lengths[line]):
            s.orders[line, k] = s.orders[line, k + 1]
        s.orders[line, i] = FUSED * q.x.nodes + n
    return float(s.end[line, i - 1]) if i > 0 else 0.0


@compiled
def _move(q: JointProblem, s: JointSequences, random: NDArray[np.uint64], along: bool) -> tuple[float, int, bool]:
    """Shift an operation: (since when that changes anything or -1, its line, whether all replicas changed)."""
    if along:
        arc = below(random, s.arc_count[0])
        line, source = s.arcs[arc, 0], s.arcs[arc, 1]
        steps = 1 + below(random, 6)
        if uniform(random) < 0.5:
            target = source - steps
        else:
            source -= 1
            target = source + steps
    else:
        line = below(random, len(s.lengths))
        source = below(random, s.lengths[line])
        target = source + below(random, 25) - 12
    target = max(0, min(s.lengths[line] - 1, target))
    if source == target:
        return -1.0, line, False
    stop = blocked(q, s.orders[line], source, target)
    if stop == 2:
        return swap_events(q, s, line, source, target > source), line, True
    if stop == 1:
        return -1.0, line, False
    shift(s.orders[line], source, target)
    low = min(source, target)
    return (float(s.end[line, low - 1]) if low > 0 else 0.0), line, False


@compiled
def improve_joint(
    q: JointProblem, s: JointSequences, random: NDArray[np.uint64], values: Floats, heat: float, evaluations: int
) -> None:
    """``evaluations`` moves of annealing at temperature ``heat`` (seconds); ``values`` ``[2]``: times of the orders
    under way and of the best."""
    x = q.x
    candidates = q.duration.shape[1]
    for _ in range(evaluations):
        what = uniform(random)
        line, everywhere, since, node, old = 0, False, -1.0, -1, np.int8(0)
        if what < ANY:
            since, line, everywhere = _move(q, s, random, what < ARC and s.arc_count[0] > 0)
        elif what < SPLIT:
            n = below(random, x.nodes)
            if q.has_weight[n]:
                g = 0
                while n >= x.base[g + 1]:
                    g += 1
                line = g * x.ranks + (n - x.base[g]) % x.ranks
                since = toggle_split(q, s, n, line, below(random, 40))
        elif candidates > 1:
            n = below(random, x.nodes)
            old = s.strategy[n]
            if old > 0:
                node = n
                g = 0
                while n >= x.base[g + 1]:
                    g += 1
                line = g * x.ranks + (n - x.base[g]) % x.ranks
                everywhere = x.chunk[n] >= 0
                chosen = np.int8(below(random, int(old)))
                since = np.inf
                for h in range(x.replicas):
                    m = q.member[h, q.place_of[n]]
                    if m == n or (everywhere and m >= 0):
                        s.strategy[m] = chosen
                        other = h * x.ranks + line % x.ranks
                        i = s.place[0, m]
                        since = min(since, s.end[other, i - 1] if i > 0 else 0.0)
        if since < 0.0:
            continue
        fits = line_fits(q, s, line)
        if everywhere and fits:
            for g in range(x.replicas):
                fits = fits and line_fits(q, s, g * x.ranks + line % x.ranks)
        accepted = False
        time = np.inf
        if fits:
            limit = values[0] - heat * np.log(1.0 - uniform(random))
            time = replay_from(q, s, since, limit)
            accepted = time <= limit
            settle(q, s, accepted)
        else:
            for g in range(x.replicas):
                if everywhere or g * x.ranks + line % x.ranks == line:
                    restore(s, g * x.ranks + line % x.ranks)
        if accepted:
            values[0] = time
            trace_joint(q, s, random)
            if time < values[1]:
                values[1] = time
                for n in range(len(s.lengths)):
                    s.best_lengths[n] = s.lengths[n]
                    for i in range(s.lengths[n]):
                        s.best_orders[n, i] = s.orders[n, i]
                for n in range(len(s.strategy)):
                    s.best_strategy[n] = s.strategy[n]
        elif node >= 0:
            for h in range(x.replicas):
                m = q.member[h, q.place_of[node]]
                if m == node or (everywhere and m >= 0):
                    s.strategy[m] = old
