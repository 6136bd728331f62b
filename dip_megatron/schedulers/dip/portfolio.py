"""A few dozen list schedules from sensible priorities: good plans within milliseconds, and starts for the search."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from ...core.graph import Floats
from .keys import ALTERNATE, LEAN_AT_ONCE, WAIT_WEIGHT, Keys, copy_keys, make_keys
from .problem import Problem

BACKWARD_FIRST = 1e6


def microbatch_orders(q: Problem) -> list[Floats]:
    """Places of the groups: as they come, small ones at both ends, zigzag, ascending, descending by work."""
    virtual_microbatches, ranks = q.graph.virtual_microbatches, q.graph.ranks
    work = np.bincount(
        q.group, weights=q.graph.duration[0, 0].reshape(virtual_microbatches, ranks).sum(axis=1), minlength=q.groups
    )
    up = np.argsort(work, kind="stable")
    both_ends = np.concatenate([up[0::2], up[1::2][::-1]])
    zigzag = np.empty_like(up)
    zigzag[0::2], zigzag[1::2] = up[: (len(up) + 1) // 2], up[(len(up) + 1) // 2 :][::-1]
    orders = []
    for order in (np.arange(q.groups), both_ends, up, zigzag, up[::-1]):
        place = np.empty(q.groups)
        place[order] = np.arange(q.groups)
        orders.append(place)
    return orders


WINDOWS = (8, 4, 3, 6, 2, 1)


def levels(q: Problem, *, split: bool) -> Iterator[Keys]:
    """The natural order, forwards and backwards by priority or in turns; where memory matters, also with few
    microbatches under way at a time and leaner strategies as everyone's fastest."""
    sinks = len(q.reservation)
    matters = bool(q.bounded.any())
    most = q.graph.candidates - 1
    # A stage's last strategy need not be its leanest: never start past the one that its claim counts on.
    leanest = q.activation.argmin(axis=0).astype(np.int8)
    windows = [sinks, *(w for w in WINDOWS if w < sinks)] if matters else [sinks]
    # What split backwards hold for W is memory too: where that is short, fused ones may be better.
    splits = (True, False) if split and matters else (split,)
    bases = dict.fromkeys((0, (3 * most + 3) // 4, most, 1) if matters and most else (0,))
    leans = (True, False) if matters and most else (False,)
    for window, base, alternate, halves, lean in itertools.product(windows, bases, (True, False), splits, leans):
        keys = make_keys(q, halves)
        keys.base[:] = np.minimum(leanest, base)
        keys.window[:] = window
        keys.flags[ALTERNATE] = alternate
        keys.flags[LEAN_AT_ONCE] = lean
        keys.waits[WAIT_WEIGHT] = 0.3
        yield keys


def variations(q: Problem, start: Keys, *, reorder: bool) -> Iterator[Keys]:
    """``start`` with other orders of microbatches, backbone ahead or behind, forwards or backwards first."""
    orders = microbatch_orders(q)[: 5 if reorder else 1]
    ranks = q.graph.ranks
    offsets = [np.zeros(ranks), np.full(ranks, BACKWARD_FIRST), np.arange(ranks, 0.0, -1.0) / 2, np.full(ranks, -2.0)]
    for shift in (0.0, 2.0, -2.0):
        for offset in offsets:
            for order in orders:
                keys = copy_keys(start)
                keys.order_forward[:] = order
                keys.order_backward[:] = order
                keys.shift_forward[q.backbone] = shift
                keys.offset[:] = offset
                yield keys
