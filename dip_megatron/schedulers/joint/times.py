"""When operations of coupled replicas start and end after a change of orders, looking only at what the change moves.

Operations whose times may have changed wait in a heap, by when they started before the change; each is timed again,
and what waits for it is put there if it now ends at another time. Before a change the *tail* of every operation is
known, the longest path from its start to the end of all. An operation that started after the one that a change moves
doesn't lead to it, and what it leads to still runs in the same order, so that its tail is no less after the change: a
trial is given up as soon as one of them starts too late for its tail. Most are, within a few operations.
"""

from __future__ import annotations

import numpy as np

from ...core.simulate.compiled import compiled
from ...core.simulate.kernels import FORWARD, WEIGHT
from .sequences import CHANGED, HEAP, TOUCHED, JointProblem, JointSequences, number_of

ROUNDING = 1.0 + 1e-12
"""What sums of seconds in another order may differ by."""
VISITS = 2
"""An operation is timed so often in a trial: orders that can't end put one another off for ever."""


@compiled
def push(q: JointProblem, s: JointSequences, number: int, key: float) -> None:
    """Put an operation (of an event: all members) into the heap, as if it had started at ``key``."""
    n = number % q.x.nodes
    if number < 2 * q.x.nodes and q.x.chunk[n] >= 0:
        number += q.member[0, q.place_of[n]] - n
    if s.is_waiting[number]:
        return
    s.is_waiting[number] = True
    i = s.counts[HEAP]
    s.counts[HEAP] = i + 1
    while i > 0:
        up = (i - 1) >> 1
        if s.key[up] <= key:
            break
        s.key[i], s.heap[i] = s.key[up], s.heap[up]
        i = up
    s.key[i], s.heap[i] = key, number


@compiled
def pop(s: JointSequences) -> int:
    """The number with the least key."""
    found = s.heap[0]
    s.is_waiting[found] = False
    count = s.counts[HEAP] - 1
    s.counts[HEAP] = count
    key, number = s.key[count], s.heap[count]
    i = 0
    while True:
        down = 2 * i + 1
        if down >= count:
            break
        if down + 1 < count and s.key[down + 1] < s.key[down]:
            down += 1
        if s.key[down] >= key:
            break
        s.key[i], s.heap[i] = s.key[down], s.heap[down]
        i = down
    s.key[i], s.heap[i] = key, number
    return int(found)


@compiled
def first_start(s: JointSequences, number: int) -> float:
    """When an operation started before the trial."""
    return float(s.before_start[number] if s.is_touched[number] else s.start[number])


@compiled
def _ready(q: JointProblem, s: JointSequences, number: int) -> float:
    """When an operation could start: its rank is free and its inputs are there."""
    x = q.x
    kind = number // x.nodes
    n = number - kind * x.nodes
    place = s.place[number]
    ready = 0.0
    if place > 0:
        ready = s.end[number_of(q, s.orders[q.line[n], place - 1])]
    if kind == FORWARD:
        for e in range(x.before_start[n], x.before_start[n + 1]):
            ready = max(ready, s.end[x.before[e]] + x.before_transfer[e])
    elif kind != WEIGHT:
        for e in range(x.after_start[n], x.after_start[n + 1]):
            ready = max(ready, s.end[x.nodes + x.after[e]] + x.after_transfer[e])
    return ready


@compiled
def _length(q: JointProblem, s: JointSequences, number: int) -> float:
    n = number % q.x.nodes
    kind = s.orders[q.line[n], s.place[number]] // q.x.nodes
    return float(q.duration[kind, s.strategy[n], n])


@compiled
def _set(q: JointProblem, s: JointSequences, number: int, begin: float, end: float) -> None:
    """Give an operation other times, and look again at what waits for it."""
    x = q.x
    if not s.is_touched[number]:
        s.is_touched[number] = True
        s.before_start[number], s.before_end[number] = s.start[number], s.end[number]
        s.touched[s.counts[TOUCHED]] = number
        s.visits[number] = 0
        s.counts[TOUCHED] += 1
    s.visits[number] += 1
    s.start[number] = begin
    if s.end[number] == end:
        return
    s.end[number] = end
    kind = number // x.nodes
    n = number - kind * x.nodes
    line, place = q.line[n], s.place[number] + 1
    if place < s.lengths[line]:
        m = number_of(q, s.orders[line, place])
        push(q, s, m, first_start(s, m))
    if kind == FORWARD:
        for e in range(x.after_start[n], x.after_start[n + 1]):
            m = x.after[e]
            push(q, s, m, first_start(s, m))
    elif kind != WEIGHT:
        for e in range(x.before_start[n], x.before_start[n + 1]):
            m = x.before[e]
            if q.has_backward[m]:
                push(q, s, x.nodes + m, first_start(s, x.nodes + m))


@compiled
def retime(q: JointProblem, s: JointSequences, after: float, limit: float) -> float:
    """The time of the orders once all that waits in the heap is timed again; inf as soon as it is known to be over
    ``limit``. Tails hold for what started later than ``after``, and but for ``less`` for what started since then."""
    x = q.x
    while s.counts[HEAP] > 0:
        number = pop(s)
        n = number % x.nodes
        event = number < 2 * x.nodes and x.chunk[n] >= 0
        begin, longest = 0.0, 0.0
        if event:
            node = q.place_of[n]
            for g in range(x.replicas):
                m = number - n + q.member[g, node]
                begin = max(begin, _ready(q, s, m))
                longest = max(longest, _length(q, s, m))
        else:
            begin, longest = _ready(q, s, number), _length(q, s, number)
        end = begin + longest
        if begin == s.start[number] and end == s.end[number]:
            continue
        if end > limit or (s.is_touched[number] and s.visits[number] == VISITS):
            return np.inf
        before = first_start(s, number)
        if before > after and begin + s.tail[number] > limit * ROUNDING:
            return np.inf
        if before > s.less[0] and begin + s.tail[number] - s.less[1] > limit * ROUNDING:
            return np.inf
        if event:
            node = q.place_of[n]
            for g in range(x.replicas):
                _set(q, s, number - n + q.member[g, node], begin, end)
        else:
            _set(q, s, number, begin, end)
    return latest_end(q, s)


@compiled
def latest_end(q: JointProblem, s: JointSequences) -> float:
    """When the last line is done."""
    latest = 0.0
    for line in range(len(s.lengths)):
        if s.lengths[line] > 0:
            latest = max(latest, s.end[number_of(q, s.orders[line, s.lengths[line] - 1])])
    return latest


@compiled
def _tail(q: JointProblem, s: JointSequences, number: int) -> float:
    """The longest path from the end of an operation to the end of all."""
    x = q.x
    kind = number // x.nodes
    n = number - kind * x.nodes
    line, place = q.line[n], s.place[number] + 1
    tail = 0.0
    if place < s.lengths[line]:
        tail = s.tail[number_of(q, s.orders[line, place])]
    if kind == FORWARD:
        for e in range(x.after_start[n], x.after_start[n + 1]):
            tail = max(tail, s.tail[x.after[e]] + x.after_transfer[e])
    elif kind != WEIGHT:
        for e in range(x.before_start[n], x.before_start[n + 1]):
            if q.has_backward[x.before[e]]:
                tail = max(tail, s.tail[x.nodes + x.before[e]] + x.before_transfer[e])
    return tail


@compiled
def _before(q: JointProblem, s: JointSequences, number: int) -> None:
    """Look again at the tails of what an operation waits for."""
    x = q.x
    kind = number // x.nodes
    n = number - kind * x.nodes
    place = s.place[number] - 1
    if place >= 0:
        m = number_of(q, s.orders[q.line[n], place])
        push(q, s, m, -s.start[m])
    if kind == FORWARD:
        for e in range(x.before_start[n], x.before_start[n + 1]):
            m = x.before[e]
            push(q, s, m, -s.start[m])
    elif kind != WEIGHT:
        for e in range(x.after_start[n], x.after_start[n + 1]):
            m = x.nodes + x.after[e]
            push(q, s, m, -s.start[m])


@compiled
def retail(q: JointProblem, s: JointSequences) -> None:
    """Work out the tails of all that waits in the heap, and of what these change."""
    x = q.x
    while s.counts[HEAP] > 0:
        number = pop(s)
        n = number % x.nodes
        tail = 0.0
        if number < 2 * x.nodes and x.chunk[n] >= 0:
            node = q.place_of[n]
            for g in range(x.replicas):
                tail = max(tail, _tail(q, s, number - n + q.member[g, node]))
            tail += s.end[number] - s.start[number]
            if tail != s.tail[number]:
                for g in range(x.replicas):
                    s.tail[number - n + q.member[g, node]] = tail
                for g in range(x.replicas):
                    _before(q, s, number - n + q.member[g, node])
        else:
            tail = _tail(q, s, number) + s.end[number] - s.start[number]
            if tail != s.tail[number]:
                s.tail[number] = tail
                _before(q, s, number)


@compiled
def forget(s: JointSequences, accepted: bool) -> None:
    """End a trial: keep its times, or take them back."""
    for i in range(s.counts[HEAP]):
        s.is_waiting[s.heap[i]] = False
    for i in range(s.counts[TOUCHED]):
        number = s.touched[i]
        s.is_touched[number] = False
        if not accepted:
            s.start[number], s.end[number] = s.before_start[number], s.before_end[number]
    s.counts[HEAP] = 0
    s.counts[TOUCHED] = 0


@compiled
def renumber(q: JointProblem, s: JointSequences, line: int, low: int, high: int) -> None:
    """Note where the operations of some places stand."""
    for i in range(low, min(high + 1, s.lengths[line])):
        s.place[number_of(q, s.orders[line, i])] = i


@compiled
def note(s: JointSequences, line: int, low: int, high: int, last: int) -> None:
    """Keep a line as it is before operations at places ``low`` to ``high`` of it move; behind place ``last`` they all
    move alike."""
    i = s.counts[CHANGED]
    s.changed[i, 0], s.changed[i, 1], s.changed[i, 2], s.changed[i, 3] = line, low, high, last
    s.counts[CHANGED] = i + 1
    s.saved_lengths[line] = s.lengths[line]
    for j in range(low, high + 1):
        s.saved[line, j] = s.orders[line, j]


@compiled
def take_back(q: JointProblem, s: JointSequences, first: int) -> None:
    """Undo what was done to the lines noted since there were ``first``."""
    for i in range(s.counts[CHANGED] - 1, first - 1, -1):
        line, low, high = s.changed[i, 0], s.changed[i, 1], s.changed[i, 2]
        s.lengths[line] = s.saved_lengths[line]
        for j in range(low, high + 1):
            s.orders[line, j] = s.saved[line, j]
        renumber(q, s, line, low, high)
    s.counts[CHANGED] = first


@compiled
def look_at(q: JointProblem, s: JointSequences, line: int, low: int, high: int) -> None:
    """Put the operations at some places of a line into the heap."""
    for i in range(low, min(high + 1, s.lengths[line])):
        number = number_of(q, s.orders[line, i])
        push(q, s, number, first_start(s, number))


@compiled
def look_back(q: JointProblem, s: JointSequences) -> None:
    """Put the operations whose tails an accepted trial may have changed into the heap."""
    for i in range(s.counts[CHANGED]):
        line = s.changed[i, 0]
        for j in range(max(0, s.changed[i, 1] - 1), min(s.changed[i, 3] + 1, s.lengths[line])):
            number = number_of(q, s.orders[line, j])
            push(q, s, number, -s.start[number])


@compiled
def all_tails(q: JointProblem, s: JointSequences) -> None:
    """Work out every tail."""
    s.tail[:] = -1.0
    for line in range(len(s.lengths)):
        for i in range(s.lengths[line]):
            number = number_of(q, s.orders[line, i])
            push(q, s, number, -s.start[number])
    retail(q, s)
