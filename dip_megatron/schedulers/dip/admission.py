"""Which forwards a rank may start without running into a wall of memory: the banker's rule.

A rank starts a forward only if afterwards, taking the sinks in order of their groups, each can still get all it needs
from what is free plus what those before it give back, with the leanest strategy as everyone's reservation. So the first
unfinished group can always go on, on every rank, and no order of arrivals locks up. Memory that a split backward holds
for its weight gradient counts as free, because the rank can run that at any time.
"""

from __future__ import annotations

from ...core.simulate.compiled import compiled, inlined
from .problem import Problem
from .work import Records, Work


@inlined
def reserve(q: Problem, w: Work, p: int) -> None:
    """What every sink is still to get and to give back on rank ``p`` before anything has run."""
    for k in range(len(w.position)):
        a = w.reservation[p, w.position[k]]
        a.need = q.reservation[k, p]
        a.give = q.freed[k, p]
        a.passing = q.passing[k, p]
        a.passing_count = q.passing_count[k, p]


@inlined
def look_ahead(rank: Records, reservation: Records, p: int, least_size: int, window: float) -> None:
    """Fill ``room`` and ``ahead`` of rank ``p``'s reservations; no forward is smaller than ``least_size``."""
    r = rank[p]
    sinks = reservation.shape[1]
    i = r.head
    while i < sinks:
        a = reservation[p, i]
        if a.need != 0 or a.give != 0 or a.passing_count != 0:
            break
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
def admits(
    rank: Records, reservation: Records, p: int, size: int, lean: int, held: bool, first: int, last: int
) -> bool:
    """Whether rank ``p`` may take ``size`` for a forward that has ``lean`` reserved, needed by the sinks at places
    ``first`` to ``last``; ``held``: until its backward, not just while it runs."""
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


@inlined
def take(q: Problem, w: Work, p: int, s: int, strategy: int) -> None:
    """Rank ``p`` starts the forward of virtual microbatch ``s``."""
    n = s * q.graph.ranks + p
    r = w.rank[p]
    r.stale = True
    a = w.reservation[p, w.position[q.first[s]]]
    if q.graph.has_backward[n]:
        size = q.activation[strategy, n]
        r.free -= size
        a.need -= q.lean[n]
        w.reservation[p, w.position[q.last[s]]].give += size - q.lean[n]
    else:
        a.passing_count -= 1


@inlined
def give_back(q: Problem, w: Work, p: int, s: int, strategy: int) -> None:
    """Rank ``p`` starts the backward of virtual microbatch ``s``."""
    size = q.activation[strategy, s * q.graph.ranks + p]
    w.rank[p].stale = True
    w.rank[p].free += size
    w.reservation[p, w.position[q.last[s]]].give -= size
