"""The queues of the list scheduler: who comes when, as bits over places in an order by key."""

from __future__ import annotations

import numpy as np

from ...core.graph import Floats, Ints
from ...core.simulate.compiled import compiled, inlined
from .keys import Keys
from .problem import Problem
from .work import Words, Work


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
def mark(known: Words, p: int, place: int) -> None:
    """Rank ``p`` knows when the operation at ``place`` of its order can start."""
    known[p, place >> 6] |= np.uint64(1) << np.uint64(place & 63)


@inlined
def unmark(known: Words, p: int, place: int) -> None:
    """The operation at ``place`` has run."""
    known[p, place >> 6] &= ~(np.uint64(1) << np.uint64(place & 63))


@compiled
def sort_queues(q: Problem, x: Keys, w: Work) -> None:
    """Keys of the virtual microbatches and their places in both queues; places of the sinks in the order of their
    groups."""
    keys = w.keys
    virtual_microbatches = q.graph.virtual_microbatches
    for s in range(virtual_microbatches):
        keys[s] = x.order_forward[q.group[s]] + x.shift_forward[s]
        w.queued[s].key_forward = keys[s]
    insertion_sort(w.by_forward, keys)
    for s in range(virtual_microbatches):
        keys[s] = x.order_backward[q.group[s]] + x.shift_backward[s]
        w.queued[s].key_backward = keys[s]
    insertion_sort(w.by_backward, keys)
    for i in range(virtual_microbatches):
        w.queued[w.by_forward[i]].place_forward = i
        w.queued[w.by_backward[i]].place_backward = i
    insertion_sort(w.group_order, x.order_forward)
    place = 0
    for i in range(q.groups):
        for k in range(q.sink_start[w.group_order[i]], q.sink_start[w.group_order[i] + 1]):
            w.position[k] = place
            place += 1
    # The first sink in order that any forward from here on in the queue belongs to.
    first = place
    for i in range(virtual_microbatches - 1, -1, -1):
        first = min(first, w.position[q.first[w.by_forward[i]]])
        w.earliest[i] = first
