"""The list scheduler: turns priorities into the order of every rank.

Each rank has a queue of forwards and one of backwards, lowest key first (the dual-queue interleaving of the paper's
search, phase b); weight gradients fill the time in which neither can run. A forward's key is ``order_forward[group] +
shift_forward[s] + offset[rank]``, a backward's ``order_backward[group] + shift_backward[s]``. :mod:`.admission` says
which forwards memory admits.

The pieces are pasted into one kernel when it is compiled: handing its state from kernel to kernel as large tuples made
it many times slower.
"""

from __future__ import annotations

import numpy as np

from ...core.simulate.compiled import compiled, inlined, trailing_zeros
from ...core.simulate.kernels import BACKWARD, FORWARD, FUSED, WEIGHT
from .admission import admits, give_back, look_ahead, reserve, take
from .keys import ALTERNATE, LEAN_AT_ONCE, WAIT_BETTER, WAIT_LEAN, WAIT_WEIGHT, Keys
from .problem import Problem
from .queues import mark, sort_queues, unmark
from .work import Records, Work

_WAIT, _RUN_FORWARD, _RUN_BACKWARD, _RUN_WEIGHT = 0, 1, 2, 3


@compiled
def _begin(q: Problem, x: Keys, w: Work) -> None:
    """Reset the buffers and make the forwards without inputs known."""
    g = q.graph
    ranks = g.ranks
    w.known_forward[:] = 0
    w.known_backward[:] = 0
    for p in range(ranks):
        r = w.rank[p]
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
            reserve(q, w, p)
    for s in range(g.virtual_microbatches):
        for p in range(ranks):
            n = s * ranks + p
            m = w.node[n]
            m.waits_forward = g.before_start[n + 1] - g.before_start[n]
            m.waits_backward = g.after_start[n + 1] - g.after_start[n]
            m.arrives_forward = x.release[s]
            m.arrives_backward = 0.0
            if g.is_idle[n]:
                w.strategy[n] = 0
                w.orders[p, w.rank[p].length] = FORWARD * g.virtual_microbatches + s
                w.rank[p].length += 1
                continue
            _count(q, x, w.rank, p, n)
            if m.waits_forward == 0:
                mark(w.known_forward, p, w.queued[s].place_forward)
                w.rank[p].attention = min(w.rank[p].attention, x.release[s])


@inlined
def _count(q: Problem, x: Keys, rank: Records, p: int, n: int) -> None:
    """Add a stage to what its rank has to do."""
    duration, c = q.graph.duration, x.base[n]
    time = duration[FORWARD, c, n]
    rank[p].remaining += 1
    if q.graph.has_backward[n]:
        rank[p].remaining += 1
        if not q.graph.has_weight[n]:
            time += duration[BACKWARD, c, n]
        elif x.split[n]:
            time += duration[BACKWARD, c, n] + duration[WEIGHT, c, n]
        else:
            time += duration[FUSED, c, n]
    rank[p].remaining_time += time


@inlined
def _first_to_act(rank: Records, ranks: int) -> int:
    """The rank that should look at its queues first."""
    p = 0
    t = rank[0].attention
    for i in range(1, ranks):
        if rank[i].attention < t:
            t = rank[i].attention
            p = i
    return p


@inlined
def _leaner(q: Problem, w: Work, p: int, n: int, c: int, held: bool, at: int, until: int) -> int:
    """The fastest strategy slower than ``c`` with which a forward is admitted; -1 if there is none."""
    found = -1
    for d in range(c + 1, q.graph.candidates):
        if admits(w.rank, w.reservation, p, q.activation[d, n], q.lean[n], held, at, until):
            found = d
            break
    return found


@inlined
def _pick_forward(
    q: Problem, x: Keys, w: Work, p: int, t: float, lean_at_once: bool
) -> tuple[int, int, int, int, float, float]:
    """The first forward in the queue of rank ``p`` that can run at ``t``, and its strategy; the first that only a
    leaner strategy admits, and that strategy (-1 for no forward); when a known forward that may run later arrives, and
    when one more urgent than the one found (seconds, inf if none)."""
    ranks = q.graph.ranks
    bounded = w.rank[p].bounded
    sinks = len(w.position)
    closed = w.rank[p].closed if bounded else sinks
    soon, better = np.inf, np.inf
    forward, strategy, lean, lean_strategy = -1, 0, -1, 0
    blocked_at, blocked_size = sinks, 0
    dear_at, dear_size = sinks, 0
    for word in range(w.known_forward.shape[1]):
        bits = w.known_forward[p, word]
        while bits != 0 and forward < 0:
            place = (word << 6) + trailing_zeros(bits)
            if w.earliest[place] >= closed:
                bits = np.uint64(0)
                continue
            s = w.by_forward[place]
            bits &= bits - np.uint64(1)
            n = s * ranks + p
            arrival = w.node[n].arrives_forward
            c = int(x.base[n])
            fits = True
            if bounded:
                at, until = w.position[q.first[s]], w.position[q.last[s]]
                held, least, size = q.graph.has_backward[n], q.lean[n], q.activation[c, n]
                if held and at >= blocked_at and least >= blocked_size:
                    continue
                if lean >= 0 and at >= dear_at and size >= dear_size:
                    continue  # most likely too large as well, and a leaner one is at hand
                fits = admits(w.rank, w.reservation, p, size, least, held, at, until)
                if not fits and not admits(w.rank, w.reservation, p, least, least, held, at, until):
                    # Nor does any forward that comes later in the sinks' order and is no smaller.
                    blocked_at, blocked_size = at, least
                elif not fits and (lean < 0 or lean_at_once):
                    dear_at, dear_size = at, size
                    d = _leaner(q, w, p, n, c, held, at, until)
                    if d >= 0 and lean_at_once:
                        fits = True
                        c = d
                    elif d >= 0 and arrival <= t:
                        lean = s
                        lean_strategy = d
                    elif d >= 0:
                        soon = min(soon, arrival)
            if fits and arrival > t:
                soon = min(soon, arrival)
                better = min(better, arrival)
            elif fits:
                forward = s
                strategy = c
        if forward >= 0:
            break
    return forward, strategy, lean, lean_strategy, soon, better


@inlined
def _pick_backward(w: Work, p: int, t: float, ranks: int) -> tuple[int, float]:
    """The first backward in the queue of rank ``p`` that can run at ``t`` (-1 for none), and when the first of those
    before it, or of all, arrives (seconds, inf if none)."""
    backward = -1
    soon = np.inf
    for word in range(w.known_backward.shape[1]):
        bits = w.known_backward[p, word]
        while bits != 0 and backward < 0:
            s = w.by_backward[(word << 6) + trailing_zeros(bits)]
            bits &= bits - np.uint64(1)
            arrival = w.node[s * ranks + p].arrives_backward
            if arrival > t:
                soon = min(soon, arrival)
            else:
                backward = s
        if backward >= 0:
            break
    return backward, soon


@inlined
def _prefers_forward(x: Keys, w: Work, p: int, forward: int, backward: int) -> bool:
    """Which of a forward and a backward that can both run goes first."""
    if forward < 0 or backward < 0:
        return bool(backward < 0)
    if x.flags[ALTERNATE]:
        return not w.rank[p].was_forward
    return bool(w.queued[forward].key_forward + x.offset[p] < w.queued[backward].key_backward)


@inlined
def _run_forward(q: Problem, x: Keys, w: Work, p: int, s: int, c: int, t: float) -> float:
    """Start a forward at ``t`` seconds with strategy ``c``; returns its end."""
    g, node = q.graph, w.node
    r = w.rank[p]
    n = s * g.ranks + p
    w.strategy[n] = c
    end = t + g.duration[FORWARD, c, n]
    w.orders[p, r.length] = FORWARD * g.virtual_microbatches + s
    r.was_forward = True
    r.remaining_time -= g.duration[FORWARD, x.base[n], n]
    unmark(w.known_forward, p, w.queued[s].place_forward)
    if r.bounded:
        take(q, w, p, s, c)
    for e in range(g.after_start[n], g.after_start[n + 1]):
        m = g.after[e]
        b = node[m]
        b.waits_forward -= 1
        b.arrives_forward = max(b.arrives_forward, end + g.after_transfer[e])
        if b.waits_forward == 0:
            to = m % g.ranks
            mark(w.known_forward, to, w.queued[m // g.ranks].place_forward)
            w.rank[to].attention = min(w.rank[to].attention, max(w.rank[to].clock, b.arrives_forward))
    if g.has_backward[n] and g.after_start[n] == g.after_start[n + 1]:
        node[n].arrives_backward = end
        mark(w.known_backward, p, w.queued[s].place_backward)
    return float(end)


@inlined
def _kind_of_backward(q: Problem, x: Keys, w: Work, p: int, n: int, c: int) -> int:
    """B, or BW where the stage is not split or has no room to keep what its W needs; puts a W in the queue."""
    duration, planned = q.graph.duration, x.base[n]
    r = w.rank[p]
    kind = BACKWARD
    if not q.graph.has_weight[n]:
        r.remaining_time -= duration[BACKWARD, planned, n]
    elif not x.split[n]:
        kind = FUSED
        r.remaining_time -= duration[FUSED, planned, n]
    else:
        r.remaining_time -= duration[BACKWARD, planned, n]
        if r.bounded and r.free + q.activation[c, n] < q.deferred_activation[c, n]:
            kind = FUSED
            r.remaining_time -= duration[WEIGHT, planned, n]
        else:
            w.queue[p, r.queue_tail] = n
            r.queue_tail += 1
            r.remaining += 1
            if r.bounded:
                r.free -= q.deferred_activation[c, n]
                r.pending += q.deferred_activation[c, n]
    return kind


@inlined
def _run_backward(q: Problem, x: Keys, w: Work, p: int, s: int, t: float) -> float:
    """Start a backward at ``t`` seconds; returns its end."""
    g, node = q.graph, w.node
    r = w.rank[p]
    n = s * g.ranks + p
    c = int(w.strategy[n])
    kind = _kind_of_backward(q, x, w, p, n, c)
    end = t + g.duration[kind, c, n]
    w.orders[p, r.length] = kind * g.virtual_microbatches + s
    r.was_forward = False
    unmark(w.known_backward, p, w.queued[s].place_backward)
    if r.bounded:
        give_back(q, w, p, s, c)
    for e in range(g.before_start[n], g.before_start[n + 1]):
        m = g.before[e]
        if g.has_backward[m]:
            b = node[m]
            b.waits_backward -= 1
            b.arrives_backward = max(b.arrives_backward, end + g.before_transfer[e])
            if b.waits_backward == 0:
                to = m % g.ranks
                mark(w.known_backward, to, w.queued[m // g.ranks].place_backward)
                w.rank[to].attention = min(w.rank[to].attention, max(w.rank[to].clock, b.arrives_backward))
    return float(end)


@inlined
def _run_weight(q: Problem, x: Keys, w: Work, p: int, t: float) -> float:
    """Start the weight gradient that waits longest at ``t`` seconds; returns its end."""
    g = q.graph
    r = w.rank[p]
    n = w.queue[p, r.queue_head]
    r.queue_head += 1
    c = w.strategy[n]
    w.orders[p, r.length] = WEIGHT * g.virtual_microbatches + n // g.ranks
    r.remaining_time -= g.duration[WEIGHT, x.base[n], n]
    if r.bounded:
        r.free += q.deferred_activation[c, n]
        r.pending -= q.deferred_activation[c, n]
    return float(t + g.duration[WEIGHT, c, n])


@compiled
def dispatch(q: Problem, x: Keys, w: Work, limit: float) -> float:
    """List schedule of ``x``: orders, lengths and strategies in ``w``; returns the iteration time, or inf as soon as
    some rank can't end before ``limit`` (seconds) any more, or if memory stops every rank (which only happens when a
    group does not fit alone)."""
    sort_queues(q, x, w)
    _begin(q, x, w)
    ranks, duration = q.graph.ranks, q.graph.duration
    lean_at_once = x.flags[LEAN_AT_ONCE]
    wait_weight, wait_better, wait_lean = x.waits[WAIT_WEIGHT], x.waits[WAIT_BETTER], x.waits[WAIT_LEAN]
    latest = 0.0
    while True:
        p = _first_to_act(w.rank, ranks)
        r = w.rank[p]
        t = r.attention
        if t == np.inf:
            break
        if r.bounded and r.stale:
            look_ahead(w.rank, w.reservation, p, q.least[p], x.window[p])
        forward, strategy, lean, lean_strategy, soon, better_forward = _pick_forward(q, x, w, p, t, lean_at_once)
        backward, better_backward = _pick_backward(w, p, t, ranks)
        soon = min(soon, better_backward)
        # Which of them?
        action = _WAIT
        s = forward
        if forward >= 0 or backward >= 0:
            forward_first = _prefers_forward(x, w, p, forward, backward)
            action = _RUN_FORWARD if forward_first else _RUN_BACKWARD
            s = forward if forward_first else backward
            better = better_forward if forward_first else better_backward
            if better - t <= wait_better * duration[FORWARD, 0, s * ranks + p]:
                soon = better
                action = _WAIT
        elif r.queue_head < r.queue_tail:
            n = w.queue[p, r.queue_head]
            if soon - t > wait_weight * duration[WEIGHT, w.strategy[n], n]:
                action = _RUN_WEIGHT
        elif lean >= 0 and soon - t > wait_lean * duration[FORWARD, lean_strategy, lean * ranks + p]:
            action = _RUN_FORWARD
            s = lean
            strategy = lean_strategy
        if action == _WAIT:
            r.attention = soon
            continue
        if action == _RUN_FORWARD and r.bounded and q.activation[strategy, s * ranks + p] > r.free:
            # Admitted against memory that pending weight gradients hold: give that back first.
            action = _RUN_WEIGHT
        if action == _RUN_FORWARD:
            end = _run_forward(q, x, w, p, s, strategy, t)
        elif action == _RUN_BACKWARD:
            end = _run_backward(q, x, w, p, s, t)
        else:
            end = _run_weight(q, x, w, p, t)
        r.length += 1
        r.remaining -= 1
        r.clock = end
        r.attention = end if r.remaining > 0 else np.inf
        latest = max(latest, end)
        if end + r.remaining_time > limit:
            return np.inf
    for p in range(ranks):
        w.lengths[p] = w.rank[p].length
        if w.rank[p].remaining > 0:
            return np.inf
    return latest
