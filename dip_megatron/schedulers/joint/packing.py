"""Operations of coupled replicas moved into gaps, all at once.

A schedule made for all replicas leaves gaps where one of them has less than the others. A pass takes all operations in
the order in which they start and puts each where it can start first, in a gap between two operations placed before it
if it fits there; an event comes behind all that its lines have run so far, in all replicas at once. Nothing starts
later than it did: what was placed before has moved forward, so that an operation's own place is free. The same from the
end, with time turned round, puts each as late as can be and ends none earlier. Both in turns change orders where there
is time left, and never make the whole longer. An operation passes no other one if its rank would then hold more than it
may.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...core.graph import Floats, Ints
from ...core.simulate.compiled import compiled
from ...core.simulate.kernels import BACKWARD, FORWARD, WEIGHT
from .moves import is_split
from .sequences import HEAP, JointProblem, JointSequences, number_of
from .times import latest_end, pop, push


class Packing(NamedTuple):
    """What a pass has placed: ``placed`` ``[G * P, L]`` numbers line by line, ``counts`` of each; ``start`` and ``end``
    ``[3N]`` by number, in the time of the pass; ``waiting`` ``[3N]``: how many an operation (the first member of an
    event) still waits for. ``before`` and ``most`` ``[G * P, L]``: bytes held before each that is placed, and at most
    while it runs; ``held`` ``[G * P, L + 1]``: after so many operations of the order before the pass. ``codes``,
    ``near`` and ``delay``: room for a line, and for what is next to an operation."""

    placed: Ints
    counts: Ints
    codes: Ints
    start: Floats
    end: Floats
    waiting: Ints
    before: Floats
    most: Floats
    held: Floats
    near: Ints
    delay: Floats


def make_packing(q: JointProblem, s: JointSequences) -> Packing:
    """Room for passes over ``s``."""
    numbers = len(s.start)
    degree = int(max(np.diff(q.x.before_start).max(initial=0), np.diff(q.x.after_start).max(initial=0))) + 1
    lines, length = s.orders.shape
    return Packing(
        placed=np.zeros((lines, length), dtype=np.int32), counts=np.zeros(lines, dtype=np.int32),
        codes=np.zeros(length, dtype=np.int32), start=np.zeros(numbers), end=np.zeros(numbers),
        waiting=np.zeros(numbers, dtype=np.int32),
        before=np.zeros((lines, length)), most=np.zeros((lines, length)), held=np.zeros((lines, length + 1)),
        near=np.zeros(degree, dtype=np.int32), delay=np.zeros(degree),
    )  # fmt: skip


@compiled
def _neighbours(q: JointProblem, s: JointSequences, w: Packing, number: int, after: bool) -> int:
    """What must end before an operation, or may start ``after`` it, with the seconds in between, into ``near`` and
    ``delay``: how many. Those before or after it on its line are left out, but for its own stage's."""
    x = q.x
    kind = number // x.nodes
    n = number - kind * x.nodes
    count = 0
    if (kind == FORWARD) != after and kind != WEIGHT:
        for e in range(x.before_start[n], x.before_start[n + 1]):
            m = x.before[e]
            if kind == FORWARD or q.has_backward[m]:
                w.near[count], w.delay[count] = kind * x.nodes + m, x.before_transfer[e]
                count += 1
    elif kind != WEIGHT:
        for e in range(x.after_start[n], x.after_start[n + 1]):
            m = x.after[e]
            if kind == FORWARD or q.has_backward[m]:
                w.near[count], w.delay[count] = kind * x.nodes + m, x.after_transfer[e]
                count += 1
    own = -1
    if after:
        if (kind == FORWARD and q.has_backward[n]) or (kind == BACKWARD and is_split(q, s, n)):
            own = number + x.nodes
    elif kind != FORWARD:
        own = number - x.nodes
    if own >= 0:
        w.near[count], w.delay[count] = own, 0.0
        count += 1
    return count


@compiled
def _first(q: JointProblem, number: int) -> int:
    """The first member of an event; any other operation itself."""
    n = number % q.x.nodes
    if number < 2 * q.x.nodes and q.x.chunk[n] >= 0:
        return int(number + q.member[0, q.place_of[n]] - n)
    return number


@compiled
def _bytes(q: JointProblem, s: JointSequences, number: int) -> tuple[float, float]:
    """Bytes more than before that a rank holds at most while an operation runs, and when it has ended."""
    kind = number // q.x.nodes
    n = number - kind * q.x.nodes
    size, deferred = q.activation[s.strategy[n], n], q.deferred_activation[s.strategy[n], n]
    if kind == FORWARD:
        return size, size if q.has_backward[n] else 0.0
    change = -deferred if kind == WEIGHT else -size
    if kind == BACKWARD and is_split(q, s, n):
        change += deferred
    return change, change


@compiled
def _all_held(q: JointProblem, s: JointSequences, w: Packing) -> None:
    """Bytes before every operation of the orders as they are, and after the last."""
    for line in range(len(s.lengths)):
        w.held[line, 0] = q.static[line]
        if q.bounded[line]:
            for i in range(s.lengths[line]):
                change = _bytes(q, s, number_of(q, s.orders[line, i]))[1]
                w.held[line, i + 1] = w.held[line, i] + change


@compiled
def _before(
    q: JointProblem, s: JointSequences, w: Packing, line: int, at: int, change: float, turned: bool
) -> float:  # fmt: skip
    """Bytes held before an operation that is placed before the ``at``-th one placed on its line: what was placed is the
    first, or (``turned``) the last part of the order, and the rest of it stands as it did."""
    count, length = w.counts[line], s.lengths[line]
    if at == count:
        return float(w.held[line, length - count - 1 if turned else count])
    if not turned:
        return float(w.before[line, at])
    return float((w.before[line, at - 1] if at > 0 else w.held[line, length]) - change)


@compiled
def _gap(q: JointProblem, s: JointSequences, w: Packing, number: int, ready: float, turned: bool) -> tuple[int, float]:
    """Where on its line an operation can start first, and when."""
    line = q.line[number % q.x.nodes]
    at, length = w.counts[line], s.end[number] - s.start[number]
    begin = max(ready, w.end[w.placed[line, at - 1]]) if at > 0 else ready
    most, change = _bytes(q, s, number)
    more = -change if turned else change  # of what it passes
    highest, i = -np.inf, at - 1
    while length > 0.0 and i >= 0 and ready + length <= w.start[w.placed[line, i]]:
        highest = max(highest, w.most[line, i])
        early = max(ready, w.end[w.placed[line, i - 1]]) if i > 0 else ready
        if early + length <= w.start[w.placed[line, i]]:
            if q.bounded[line]:
                mine = _before(q, s, w, line, i, change, turned) + most
                if mine > q.limit[line] or (more > 0.0 and highest + more > q.limit[line]):
                    break
            at, begin = i, early
        i -= 1
    return at, begin


@compiled
def _put(
    q: JointProblem, s: JointSequences, w: Packing, number: int, at: int, begin: float, length: float, turned: bool
) -> None:  # fmt: skip
    """Place an operation before the ``at``-th one placed on its line."""
    line = q.line[number % q.x.nodes]
    most, change = _bytes(q, s, number)
    held = _before(q, s, w, line, at, change, turned)
    more = -change if turned else change
    for i in range(w.counts[line], at, -1):
        w.placed[line, i] = w.placed[line, i - 1]
        w.before[line, i], w.most[line, i] = w.before[line, i - 1] + more, w.most[line, i - 1] + more
    w.placed[line, at], w.before[line, at], w.most[line, at] = number, held, held + most
    w.counts[line] += 1
    w.start[number], w.end[number] = begin, begin + length


@compiled
def _release(q: JointProblem, s: JointSequences, w: Packing, number: int, turned: bool) -> None:
    """One less that an operation waits for; nothing else: its turn has come."""
    m = _first(q, number)
    w.waiting[m] -= 1
    if w.waiting[m] == 0:
        push(q, s, m, -s.end[m] if turned else s.start[m])


@compiled
def _release_all(q: JointProblem, s: JointSequences, w: Packing, number: int, turned: bool) -> None:
    """An operation is placed: what waits for it, and what comes next on its line."""
    for i in range(_neighbours(q, s, w, number, not turned)):
        _release(q, s, w, w.near[i], turned)
    line, i = q.line[number % q.x.nodes], s.place[number] + (-1 if turned else 1)
    if 0 <= i < s.lengths[line]:
        _release(q, s, w, number_of(q, s.orders[line, i]), turned)


@compiled
def _ready(q: JointProblem, s: JointSequences, w: Packing, number: int, start: float, turned: bool) -> float:
    """When an operation could start if its rank were free, ``start`` at the earliest."""
    for i in range(_neighbours(q, s, w, number, turned)):
        start = max(start, w.end[w.near[i]] + w.delay[i])
    return start


@compiled
def packed(q: JointProblem, s: JointSequences, w: Packing, turned: bool) -> None:
    """One pass, ``turned``: from the end, in a time that runs back from it. Needs the times of the orders in ``s``, and
    leaves the new orders and times there."""
    x = q.x
    step = -1 if turned else 1
    first = -latest_end(q, s) if turned else 0.0
    s.counts[HEAP] = 0
    w.counts[:] = 0
    w.waiting[:] = 0
    _all_held(q, s, w)
    for line in range(len(s.lengths)):
        for i in range(s.lengths[line]):
            number = number_of(q, s.orders[line, i])
            w.waiting[_first(q, number)] += _neighbours(q, s, w, number, turned) + (0 <= i - step < s.lengths[line])
    for line in range(len(s.lengths)):
        i = s.lengths[line] - 1 if turned else 0
        if 0 <= i < s.lengths[line]:
            m = _first(q, number_of(q, s.orders[line, i]))
            if w.waiting[m] == 0:
                push(q, s, m, -s.end[m] if turned else s.start[m])
    while s.counts[HEAP] > 0:
        number = pop(s)
        n = number % x.nodes
        length = s.end[number] - s.start[number]
        event = number < 2 * x.nodes and x.chunk[n] >= 0
        if event:
            begin = first
            for g in range(x.replicas):
                m = number - n + q.member[g, q.place_of[n]]
                begin = _ready(q, s, w, m, begin, turned)
                line = q.line[m % x.nodes]
                if w.counts[line] > 0:
                    begin = max(begin, w.end[w.placed[line, w.counts[line] - 1]])
            for g in range(x.replicas):
                m = number - n + q.member[g, q.place_of[n]]
                _put(q, s, w, m, w.counts[q.line[m % x.nodes]], begin, length, turned)
                _release_all(q, s, w, m, turned)
        else:
            at, begin = _gap(q, s, w, number, _ready(q, s, w, number, first, turned), turned)
            _put(q, s, w, number, at, begin, length, turned)
            _release_all(q, s, w, number, turned)
    _write(q, s, w, turned)


@compiled
def _write(q: JointProblem, s: JointSequences, w: Packing, turned: bool) -> None:
    """The orders and times of a pass, as those of the walk."""
    for line in range(len(s.lengths)):
        length = s.lengths[line]
        for i in range(length):
            w.codes[i] = s.orders[line, i]
        for i in range(length):
            number = w.placed[line, length - 1 - i if turned else i]
            s.orders[line, i] = w.codes[s.place[number]]
        for i in range(length):
            number = number_of(q, s.orders[line, i])
            s.place[number] = i
            begin, end = w.start[number], w.end[number]
            s.start[number], s.end[number] = (-end, -begin) if turned else (begin, end)
