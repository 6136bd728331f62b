"""Local search over the explicit orders of all coupled replicas.

As :mod:`..dip.sequences`, with what coupling allows: an operation moves in one replica, or past the same other one in
all, since what delays one event delays all replicas alike; two events of a rank change places in all of them; a
backward is split or fused, and a stage gets a faster strategy, in one replica (a stage with experts: in all).

Most changes leave the time as it is. Of these, such are taken that let operations start no later in sum, so that what
is won before an event in one replica isn't lost again before the others have it, too.
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
    ARCS,
    CHANGED,
    NODES,
    TOUCHED,
    JointProblem,
    JointSequences,
    is_event,
    line_fits,
    number_of,
    trace_joint,
)
from .times import first_start, forget, look_at, look_back, note, push, renumber, retail, retime, take_back

ARC, ANY, SPLIT = 0.70, 0.73, 0.90
"""Shares of the moves, added up: along the longest path, of any operation, of a split; the rest are of a strategy."""
ON_PATH = 0.85
"""Share of the splits and strategies that are of a stage on the longest path."""
EVERYWHERE = 0.7
"""Share of the shifts that are made in all replicas."""
LATER = 20.0
"""Seconds, over the temperature, that operations may start later in sum where the time stays the same."""
IMPOSSIBLE = -1.0


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
def is_split(q: JointProblem, s: JointSequences, n: int) -> bool:
    """Whether a stage's weight gradient runs apart."""
    return bool(q.has_weight[n]) and s.orders[q.line[n], s.place[q.x.nodes + n]] // q.x.nodes == BACKWARD


@compiled
def stands(q: JointProblem, s: JointSequences, kind: int, n: int) -> bool:
    """Whether a stage has a forward (0), backward (1) or weight gradient (2) of its own in the orders."""
    return kind == FORWARD or (q.has_backward[n] and (kind != WEIGHT or is_split(q, s, n)))


@compiled
def shift_line(q: JointProblem, s: JointSequences, line: int, source: int, target: int) -> float:
    """Move an operation within a line; since when tails hold: since it started itself. What started after that waits
    neither before for it nor for less than before: whatever else the line runs still comes in the same order."""
    low, high = min(source, target), max(source, target)
    moved, other = number_of(q, s.orders[line, source]), number_of(q, s.orders[line, target])
    note(s, line, low, high, high)
    shift(s.orders[line], source, target)
    renumber(q, s, line, low, high)
    # It is timed right after, or before, the last one that it passes: what it waits for then has its times.
    away = np.inf if target > source else -np.inf
    push(q, s, moved, np.nextafter(first_start(s, other), away))
    look_at(q, s, line, low, low + 1)
    look_at(q, s, line, high, high + 1)
    return first_start(s, moved)


@compiled
def shift_everywhere(q: JointProblem, s: JointSequences, line: int, source: int, target: int) -> float:
    """Move an operation past another in every replica that has both and room for it; since when tails hold, or
    IMPOSSIBLE."""
    x = q.x
    a, b = number_of(q, s.orders[line, source]), number_of(q, s.orders[line, target])
    a_kind, b_kind = a // x.nodes, b // x.nodes
    a_place, b_place = q.place_of[a % x.nodes], q.place_of[b % x.nodes]
    if is_event(q, s.orders[line, source]):
        later, key = target > source, first_start(s, b)
        for g in range(x.replicas):
            m, n = q.member[g, a_place], q.member[g, b_place]
            if n >= 0 and stands(q, s, b_kind, n):
                i, j = s.place[a_kind * x.nodes + m], s.place[b_kind * x.nodes + n]
                if blocked(q, s.orders[g * x.ranks + line % x.ranks], i, j) == 2:
                    return IMPOSSIBLE
                start = first_start(s, b_kind * x.nodes + n)
                key = max(key, start) if later else min(key, start)
        # Once, after or before the last or first one that it passes in any replica.
        push(q, s, a, np.nextafter(key, np.inf if later else -np.inf))
    after = IMPOSSIBLE
    for g in range(x.replicas):
        m, n = q.member[g, a_place], q.member[g, b_place]
        if m < 0 or n < 0 or not stands(q, s, a_kind, m) or not stands(q, s, b_kind, n):
            continue
        other = g * x.ranks + line % x.ranks
        i, j = s.place[a_kind * x.nodes + m], s.place[b_kind * x.nodes + n]
        if (i < j) != (source < target) or blocked(q, s.orders[other], i, j) > 0:
            continue
        count = s.counts[CHANGED]
        since = shift_line(q, s, other, i, j)
        if line_fits(q, s, other):
            after = max(after, since)
        else:
            take_back(q, s, count)
    return after


@compiled
def swap_events(q: JointProblem, s: JointSequences, line: int, i: int, later: bool) -> float:
    """Exchange the event at place ``i`` of a line with the event after it (before it, unless ``later``) in all
    replicas; since when tails hold, or IMPOSSIBLE."""
    x = q.x
    step = 1 if later else -1
    j = i + step
    while 0 <= j < s.lengths[line] and not is_event(q, s.orders[line, j]):
        j += step
    if not 0 <= j < s.lengths[line]:
        return IMPOSSIBLE
    a, b = number_of(q, s.orders[line, i]), number_of(q, s.orders[line, j])
    a_kind, b_kind = a // x.nodes, b // x.nodes
    a_place, b_place = q.place_of[a % x.nodes], q.place_of[b % x.nodes]
    for g in range(x.replicas):
        source = s.place[a_kind * x.nodes + q.member[g, a_place]]
        target = s.place[b_kind * x.nodes + q.member[g, b_place]]
        if blocked(q, s.orders[g * x.ranks + line % x.ranks], source, target) == 1:
            return IMPOSSIBLE
    after = 0.0
    for g in range(x.replicas):
        source = s.place[a_kind * x.nodes + q.member[g, a_place]]
        target = s.place[b_kind * x.nodes + q.member[g, b_place]]
        after = max(after, shift_line(q, s, g * x.ranks + line % x.ranks, source, target))
    return after


@compiled
def toggle_split(q: JointProblem, s: JointSequences, n: int, distance: int) -> float:
    """Split the backward of a stage, its weight gradient ``distance`` places after it, or fuse it; since when tails
    hold. Those of what started since the backward did are less by no more than a weight gradient that is gone."""
    nodes, line = q.x.nodes, q.line[n]
    i, length = s.place[nodes + n], s.lengths[line]
    weight = 2 * nodes + n
    after = first_start(s, nodes + n)
    if s.orders[line, i] // nodes == FUSED:
        target = min(length, i + 1 + distance)
        last = number_of(q, s.orders[line, target - 1])
        note(s, line, i, length, target)
        for j in range(length, target, -1):
            s.orders[line, j] = s.orders[line, j - 1]
        s.orders[line, target] = WEIGHT * nodes + n
        s.orders[line, i] = BACKWARD * nodes + n
        s.lengths[line] = length + 1
        s.start[weight] = s.end[weight] = s.start[last]
        s.tail[weight] = -1.0
    else:
        target = s.place[weight]
        s.less[0], s.less[1] = after, s.end[weight] - s.start[weight]
        after = first_start(s, weight)
        note(s, line, i, length - 1, target - 1)
        for k in range(target, length - 1):
            s.orders[line, k] = s.orders[line, k + 1]
        s.orders[line, i] = FUSED * nodes + n
        s.lengths[line] = length - 1
    renumber(q, s, line, i, length)
    look_at(q, s, line, i, i)
    look_at(q, s, line, target, target + 1)
    return float(after)


@compiled
def choose(q: JointProblem, s: JointSequences, n: int, chosen: int) -> float:
    """Give a stage a strategy, one that meets: in all replicas; since when tails hold: the last of its operations'
    start."""
    x = q.x
    after = 0.0
    for g in range(x.replicas):
        m = q.member[g, q.place_of[n]]
        if m == n or (x.chunk[n] >= 0 and m >= 0):
            i = s.counts[NODES]
            s.nodes[i], s.old_strategy[i] = m, s.strategy[m]
            s.counts[NODES] = i + 1
            s.strategy[m] = chosen
            for kind in range(3):
                if stands(q, s, kind, m):
                    number = kind * x.nodes + m
                    push(q, s, number, first_start(s, number))
                    after = max(after, first_start(s, number))
    return after


@compiled
def _shift(q: JointProblem, s: JointSequences, random: NDArray[np.uint64], along: bool) -> float:
    """Move an operation: since when tails hold, or IMPOSSIBLE."""
    if along:
        arc = below(random, s.counts[ARCS])
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
    number = number_of(q, s.orders[line, source])
    # A circle of operations that wait for one another is found by the time that it takes, so it must take some.
    if source == target or s.end[number] == s.start[number]:
        return IMPOSSIBLE
    stop = blocked(q, s.orders[line], source, target)
    if stop == 2:
        return swap_events(q, s, line, source, target > source)
    if stop == 1:
        return IMPOSSIBLE
    if uniform(random) < EVERYWHERE:
        return shift_everywhere(q, s, line, source, target)
    return shift_line(q, s, line, source, target)


@compiled
def change(q: JointProblem, s: JointSequences, random: NDArray[np.uint64]) -> float:
    """Change something: since when tails hold, or IMPOSSIBLE."""
    what = uniform(random)
    if what < ANY:
        return _shift(q, s, random, what < ARC and s.counts[ARCS] > 0)
    n = below(random, q.x.nodes)
    if s.counts[ARCS] > 0 and uniform(random) < ON_PATH:
        arc = below(random, s.counts[ARCS])
        n = s.orders[s.arcs[arc, 0], s.arcs[arc, 1]] % q.x.nodes
    if what < SPLIT:
        return toggle_split(q, s, n, below(random, 40)) if q.has_weight[n] else IMPOSSIBLE
    return choose(q, s, n, below(random, int(s.strategy[n]))) if s.strategy[n] > 0 else IMPOSSIBLE


@compiled
def _fits(q: JointProblem, s: JointSequences) -> bool:
    """Whether the lines that the trial changed keep to their memory."""
    for i in range(s.counts[CHANGED]):
        if not line_fits(q, s, s.changed[i, 0]):
            return False
    for i in range(s.counts[NODES]):  # noqa: SIM110 (all() would allocate)
        if not line_fits(q, s, q.line[s.nodes[i]]):
            return False
    return True


@compiled
def _later(q: JointProblem, s: JointSequences) -> float:
    """How much later forwards and backwards start than before the trial, seconds in sum."""
    later = 0.0
    for i in range(s.counts[TOUCHED]):
        number = s.touched[i]
        if number < 2 * q.x.nodes:
            later += s.start[number] - s.before_start[number]
    return later


@compiled
def improve_joint(
    q: JointProblem, s: JointSequences, random: NDArray[np.uint64], values: Floats, heat: float, evaluations: int
) -> None:
    """``evaluations`` moves of annealing at temperature ``heat`` (seconds); ``values`` ``[2]``: times of the orders
    under way and of the best."""
    for _ in range(evaluations):
        s.counts[CHANGED] = 0
        s.counts[NODES] = 0
        s.less[0] = np.inf
        after = change(q, s, random)
        if after < 0.0:
            forget(s, False)
            continue
        accepted, time = False, np.inf
        if _fits(q, s):
            limit = values[0] - heat * np.log(1.0 - uniform(random))
            time = retime(q, s, after, limit)
            accepted = time <= limit
            if accepted and time >= values[0]:
                later = _later(q, s)
                accepted = later <= 0.0 or later <= -heat * LATER * np.log(1.0 - uniform(random))
        forget(s, accepted)
        if not accepted:
            take_back(q, s, 0)
            for i in range(s.counts[NODES] - 1, -1, -1):
                s.strategy[s.nodes[i]] = s.old_strategy[i]
            continue
        values[0] = time
        look_back(q, s)
        for i in range(s.counts[NODES]):
            for kind in range(3):
                if stands(q, s, kind, s.nodes[i]):
                    number = kind * q.x.nodes + s.nodes[i]
                    push(q, s, number, -s.start[number])
        retail(q, s)
        trace_joint(q, s, random)
        if time < values[1]:
            values[1] = time
            keep_best(s)


@compiled
def keep_best(s: JointSequences) -> None:
    """Remember the orders under way as the best."""
    for n in range(len(s.lengths)):
        s.best_lengths[n] = s.lengths[n]
        for i in range(s.lengths[n]):
            s.best_orders[n, i] = s.orders[n, i]
    for n in range(len(s.strategy)):
        s.best_strategy[n] = s.strategy[n]
