"""The list scheduler: turns priorities into the order of every rank, and never runs into a wall of memory.

Each rank has a queue of forwards and one of backwards, lowest key first (the dual-queue interleaving of the paper's
search, phase b); weight gradients fill the time in which neither can run. A forward's key is ``order_forward[group] +
shift_forward[row] + offset[rank]``, a backward's ``order_backward[group] + shift_backward[row]``.

Memory: a rank starts a forward only if afterwards, taking the sinks in order of their groups, each can still get all it
needs from what is free plus what those before it give back (the banker's rule, with the leanest strategy as everyone's
claim). So the first unfinished group can always go on, on every rank, and no order of arrivals locks up. Memory that a
split backward holds for its weight gradient counts as free, because the rank can run that at any time.

One long kernel on purpose: handing its state from kernel to kernel as large tuples made it many times slower.
"""

from __future__ import annotations

import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros

from ...core.graph import Floats, Ints
from ...core.simulate.compiled import compiled, inlined
from ...core.simulate.kernels import BACKWARD, FORWARD, FUSED, WEIGHT
from .keys import ALTERNATE, LEAN_AT_ONCE, WAIT_BETTER, WAIT_LEAN, WAIT_WEIGHT, Keys
from .problem import Problem
from .work import Records, Words, Work

_WAIT, _RUN_FORWARD, _RUN_BACKWARD, _RUN_WEIGHT = 0, 1, 2, 3


@compiled
def insertion_sort(by: Ints, key: Floats) -> None:
    """Sort numbers ``by`` by ``key``, ties by number; fast when nearly sorted already."""
    for i in range(1, len(by)):
        x = by[i]
        k = key[x]
        j = i - 1
        while j >= 0 and (key[by[j]] > k or (key[by[j]] == k and by[j] > x)):
            by[j + 1] = by[j]
            j -= 1
        by[j + 1] = x


@inlined
def _mark(known: Words, p: int, place: int) -> None:
    known[p, place >> 6] |= np.uint64(1) << np.uint64(place & 63)


@inlined
def _unmark(known: Words, p: int, place: int) -> None:
    known[p, place >> 6] &= ~(np.uint64(1) << np.uint64(place & 63))


@compiled
def _sort_rows(q: Problem, x: Keys, w: Work) -> None:
    """Keys of the rows and their places in both queues; places of the sinks in the order of their groups."""
    keys = w.keys
    rows = q.graph.virtual_microbatches
    for s in range(rows):
        keys[s] = x.order_forward[q.group[s]] + x.shift_forward[s]
        w.row[s].key_forward = keys[s]
    insertion_sort(w.by_forward, keys)
    for s in range(rows):
        keys[s] = x.order_backward[q.group[s]] + x.shift_backward[s]
        w.row[s].key_backward = keys[s]
    insertion_sort(w.by_backward, keys)
    for i in range(rows):
        w.row[w.by_forward[i]].place_forward = i
        w.row[w.by_backward[i]].place_backward = i
    insertion_sort(w.group_order, x.order_forward)
    place = 0
    for i in range(q.groups):
        for k in range(q.sink_start[w.group_order[i]], q.sink_start[w.group_order[i] + 1]):
            w.position[k] = place
            place += 1
    # The first sink in order that any forward from here on in the queue belongs to.
    first = place
    for i in range(rows - 1, -1, -1):
        first = min(first, w.position[q.first[w.by_forward[i]]])
        w.earliest[i] = first


@compiled
def _begin(q: Problem, x: Keys, w: Work) -> None:
    """Reset the buffers and make the forwards without predecessors known."""
    g = q.graph
    rows, ranks = g.virtual_microbatches, g.ranks
    node, rank, reservation = w.node, w.rank, w.reservation
    duration, has_backward, has_weight = g.duration, g.has_backward, g.has_weight
    w.known_forward[:] = 0
    w.known_backward[:] = 0
    for p in range(ranks):
        r = rank[p]
        r.clock = 0.0
        r.attention = np.inf
        r.remaining_time = 0.0
        r.free = q.capacity[p]
        r.pending = 0
        r.remaining = 0
        r.length = 0
        r.queue_head = 0
        r.queue_tail = 0
        r.head = 0
        r.stale = True
        r.was_forward = False
        r.bounded = q.bounded[p]
        if q.bounded[p]:
            for k in range(len(w.position)):
                a = reservation[p, w.position[k]]
                a.need = q.reservation[k, p]
                a.give = q.freed[k, p]
                a.passing = q.passing[k, p]
                a.passing_count = q.passing_count[k, p]
    for s in range(rows):
        for p in range(ranks):
            n = s * ranks + p
            c = x.base[n]
            m = node[n]
            m.waits_forward = g.before_start[n + 1] - g.before_start[n]
            m.waits_backward = g.after_start[n + 1] - g.after_start[n]
            m.arrives_forward = 0.0
            m.arrives_backward = 0.0
            time = duration[FORWARD, c, n]
            rank[p].remaining += 1
            if has_backward[n]:
                rank[p].remaining += 1
                if not has_weight[n]:
                    time += duration[BACKWARD, c, n]
                elif x.split[n]:
                    time += duration[BACKWARD, c, n] + duration[WEIGHT, c, n]
                else:
                    time += duration[FUSED, c, n]
            rank[p].remaining_time += time
            if m.waits_forward == 0:
                _mark(w.known_forward, p, w.row[s].place_forward)
                rank[p].attention = 0.0


@inlined
def _look_ahead(rank: Records, reservation: Records, p: int, least_size: int, window: float) -> None:
    """Fill ``room`` and ``ahead`` of rank ``p``'s claims; no forward is smaller than ``least_size``."""
    r = rank[p]
    sinks = reservation.shape[1]
    i = r.head
    while (
        i < sinks
        and reservation[p, i].need == 0
        and reservation[p, i].give == 0
        and reservation[p, i].passing_count == 0
    ):
        i += 1
    r.head = i
    coming = r.free + r.pending
    least = coming
    r.closed = min(sinks, i + max(1, int(window)))
    while i < r.closed:
        a = reservation[p, i]
        if least < least_size:
            # Nothing is admitted from here on, so nobody will look.
            r.closed = i
            break
        a.ahead = coming
        a.room = least
        need = a.need
        if a.passing_count > 0:
            need = max(need, a.passing)
        least = min(least, coming - need)
        coming += a.give - a.need
        i += 1
    r.stale = False


@compiled
def _admits(
    rank: Records, reservation: Records, p: int, size: int, lean: int, held: bool, first: int, last: int
) -> bool:
    """Whether rank ``p`` may take ``size`` for a forward whose claim is ``lean``, needed by the sinks at places
    ``first`` to ``last``; ``held``: until its backward, not just while it runs. See the module's rule."""
    if not held:
        return bool(size <= rank[p].free + rank[p].pending)
    extra = size - lean
    if first >= rank[p].closed:
        return False
    a = reservation[p, first]
    if size > a.room or extra > a.ahead - a.need:
        return False
    if a.passing_count > 0 and size > a.ahead - a.passing:
        return False
    if extra > 0:
        if last >= rank[p].closed and last > first:
            return False
        for j in range(first + 1, last + 1):
            b = reservation[p, j]
            need = b.need
            if b.passing_count > 0:
                need = max(need, b.passing)
            if extra > b.ahead - need:
                return False
    return True


@compiled
def dispatch(q: Problem, x: Keys, w: Work, limit: float) -> float:
    """List schedule of ``x``: orders, lengths and strategies in ``w``; returns the iteration time, or inf as soon as
    some rank can't end before ``limit`` (seconds) any more, or if memory stops every rank (which only happens when a
    group does not fit alone)."""
    _sort_rows(q, x, w)
    _begin(q, x, w)
    g = q.graph
    rows, ranks, candidates = g.virtual_microbatches, g.ranks, g.candidates
    duration, has_backward, has_weight = g.duration, g.has_backward, g.has_weight
    before_start, before, before_transfer = g.before_start, g.before, g.before_transfer
    after_start, after, after_transfer = g.after_start, g.after, g.after_transfer
    activation, deferred_activation, lean_size, first, last = (
        q.activation,
        q.deferred_activation,
        q.lean,
        q.first,
        q.last,
    )
    least_size, earliest = q.least, w.earliest
    orders, strategy, queue, position = w.orders, w.strategy, w.queue, w.position
    node, row, rank, reservation = w.node, w.row, w.rank, w.reservation
    by_forward, by_backward, known_forward, known_backward = (
        w.by_forward,
        w.by_backward,
        w.known_forward,
        w.known_backward,
    )
    base, split_flags, offset, window = x.base, x.split, x.offset, x.window
    alternate, lean_at_once = x.flags[ALTERNATE], x.flags[LEAN_AT_ONCE]
    wait_weight, wait_better, wait_lean = x.waits[WAIT_WEIGHT], x.waits[WAIT_BETTER], x.waits[WAIT_LEAN]
    words = known_forward.shape[1]
    latest = 0.0
    while True:
        p = 0
        t = rank[0].attention
        for i in range(1, ranks):
            if rank[i].attention < t:
                t = rank[i].attention
                p = i
        if t == np.inf:
            break
        r = rank[p]
        bounded = r.bounded

        if bounded and r.stale:
            _look_ahead(rank, reservation, p, least_size[p], window[p])
        closed = r.closed if bounded else len(position)

        # What could run now? `soon`: the first known arrival of anything that may run later.
        soon = np.inf
        forward = -1
        forward_strategy = 0
        lean = -1  # the first forward that only a leaner strategy admits
        lean_strategy = 0
        blocked_at, blocked_size = len(position), 0
        dear_at, dear_size = len(position), 0
        better_forward = np.inf  # the first arrival of a forward more urgent than the one found
        for word in range(words):
            bits = known_forward[p, word]
            while bits != 0 and forward < 0:
                place = (word << 6) + np.int64(trailing_zeros(bits))
                if earliest[place] >= closed:
                    bits = np.uint64(0)
                    continue
                s = by_forward[place]
                bits &= bits - np.uint64(1)
                n = s * ranks + p
                arrival = node[n].arrives_forward
                c = int(base[n])
                fits = True
                if bounded:
                    at, until = position[first[s]], position[last[s]]
                    held = has_backward[n]
                    if held and at >= blocked_at and lean_size[n] >= blocked_size:
                        continue
                    if lean >= 0 and at >= dear_at and activation[c, n] >= dear_size:
                        continue  # most likely too large as well, and a leaner one is at hand
                    fits = _admits(rank, reservation, p, activation[c, n], lean_size[n], held, at, until)
                    if not fits and not _admits(rank, reservation, p, lean_size[n], lean_size[n], held, at, until):
                        # Nor does any forward that comes later in the sinks' order and is no smaller.
                        blocked_at, blocked_size = at, lean_size[n]
                    elif not fits and (lean < 0 or lean_at_once):
                        dear_at, dear_size = at, activation[c, n]
                        for d in range(c + 1, candidates):
                            if _admits(rank, reservation, p, activation[d, n], lean_size[n], held, at, until):
                                if lean_at_once:
                                    fits = True
                                    c = d
                                elif arrival <= t:
                                    lean = s
                                    lean_strategy = d
                                else:
                                    soon = min(soon, arrival)
                                break
                if fits:
                    if arrival > t:
                        soon = min(soon, arrival)
                        better_forward = min(better_forward, arrival)
                    else:
                        forward = s
                        forward_strategy = c
            if forward >= 0:
                break
        backward = -1
        better_backward = np.inf
        for word in range(words):
            bits = known_backward[p, word]
            while bits != 0 and backward < 0:
                s = by_backward[(word << 6) + np.int64(trailing_zeros(bits))]
                bits &= bits - np.uint64(1)
                arrival = node[s * ranks + p].arrives_backward
                if arrival > t:
                    soon = min(soon, arrival)
                    better_backward = min(better_backward, arrival)
                else:
                    backward = s
            if backward >= 0:
                break

        # Which of them?
        action = _WAIT
        s = forward
        if forward < 0 and backward < 0:
            if r.queue_head < r.queue_tail:
                n = queue[p, r.queue_head]
                if soon - t > wait_weight * duration[WEIGHT, strategy[n], n]:
                    action = _RUN_WEIGHT
            elif lean >= 0 and soon - t > wait_lean * duration[FORWARD, lean_strategy, lean * ranks + p]:
                action = _RUN_FORWARD
                s = lean
                forward_strategy = lean_strategy
        else:
            take_forward = backward < 0
            if forward >= 0 and backward >= 0:
                if alternate:
                    take_forward = not r.was_forward
                else:
                    take_forward = row[forward].key_forward + offset[p] < row[backward].key_backward
            action = _RUN_FORWARD if take_forward else _RUN_BACKWARD
            s = forward if take_forward else backward
            better = better_forward if take_forward else better_backward
            if better - t <= wait_better * duration[FORWARD, 0, s * ranks + p]:
                soon = better
                action = _WAIT
        if action == _WAIT:
            r.attention = soon
            continue
        n = s * ranks + p
        if action == _RUN_FORWARD and bounded and activation[forward_strategy, n] > r.free:
            # Admitted against memory that pending weight gradients hold: give that back first.
            action = _RUN_WEIGHT

        if action == _RUN_FORWARD:
            c = forward_strategy
            strategy[n] = c
            end = t + duration[FORWARD, c, n]
            orders[p, r.length] = FORWARD * rows + s
            r.was_forward = True
            r.remaining_time -= duration[FORWARD, base[n], n]
            _unmark(known_forward, p, row[s].place_forward)
            if bounded:
                r.stale = True
                a = reservation[p, position[first[s]]]
                if has_backward[n]:
                    r.free -= activation[c, n]
                    a.need -= lean_size[n]
                    reservation[p, position[last[s]]].give += activation[c, n] - lean_size[n]
                else:
                    a.passing_count -= 1
            for e in range(after_start[n], after_start[n + 1]):
                m = after[e]
                b = node[m]
                b.waits_forward -= 1
                b.arrives_forward = max(b.arrives_forward, end + after_transfer[e])
                if b.waits_forward == 0:
                    to = m % ranks
                    _mark(known_forward, to, row[m // ranks].place_forward)
                    rank[to].attention = min(rank[to].attention, max(rank[to].clock, b.arrives_forward))
            if has_backward[n] and after_start[n] == after_start[n + 1]:
                node[n].arrives_backward = end
                _mark(known_backward, p, row[s].place_backward)
        elif action == _RUN_BACKWARD:
            c = int(strategy[n])
            planned = base[n]
            kind = BACKWARD
            if not has_weight[n]:
                r.remaining_time -= duration[BACKWARD, planned, n]
            elif not split_flags[n]:
                kind = FUSED
                r.remaining_time -= duration[FUSED, planned, n]
            else:
                r.remaining_time -= duration[BACKWARD, planned, n]
                if bounded and r.free + activation[c, n] < deferred_activation[c, n]:
                    kind = FUSED
                    r.remaining_time -= duration[WEIGHT, planned, n]
                else:
                    queue[p, r.queue_tail] = n
                    r.queue_tail += 1
                    r.remaining += 1
                    if bounded:
                        r.free -= deferred_activation[c, n]
                        r.pending += deferred_activation[c, n]
            end = t + duration[kind, c, n]
            orders[p, r.length] = kind * rows + s
            r.was_forward = False
            _unmark(known_backward, p, row[s].place_backward)
            if bounded:
                r.stale = True
                r.free += activation[c, n]
                reservation[p, position[last[s]]].give -= activation[c, n]
            for e in range(before_start[n], before_start[n + 1]):
                m = before[e]
                if has_backward[m]:
                    b = node[m]
                    b.waits_backward -= 1
                    b.arrives_backward = max(b.arrives_backward, end + before_transfer[e])
                    if b.waits_backward == 0:
                        to = m % ranks
                        _mark(known_backward, to, row[m // ranks].place_backward)
                        rank[to].attention = min(rank[to].attention, max(rank[to].clock, b.arrives_backward))
        else:
            n = queue[p, r.queue_head]
            r.queue_head += 1
            end = t + duration[WEIGHT, strategy[n], n]
            orders[p, r.length] = WEIGHT * rows + n // ranks
            r.remaining_time -= duration[WEIGHT, base[n], n]
            if bounded:
                r.free += deferred_activation[strategy[n], n]
                r.pending -= deferred_activation[strategy[n], n]
        r.length += 1
        r.remaining -= 1
        r.clock = end
        r.attention = end if r.remaining > 0 else np.inf
        latest = max(latest, end)
        if end + r.remaining_time > limit:
            return np.inf
    for p in range(ranks):
        w.lengths[p] = rank[p].length
        if rank[p].remaining > 0:
            return np.inf
    return latest
