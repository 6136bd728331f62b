"""A few dozen list schedules from sensible priorities: good plans within milliseconds, and starts for the search."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..schedule.graph import Floats
from .dispatch import LEAN_AT_ONCE, WAIT_WEIGHT, Keys, make_keys
from .problem import Problem

BACKWARD_FIRST = 1e6


def microbatch_orders(q: Problem) -> list[Floats]:
    """Places of the groups: as they come, small ones at both ends, zigzag, ascending, descending by work."""
    rows, ranks = q.graph.rows, q.graph.ranks
    work = np.bincount(q.group, weights=q.graph.duration[0, 0].reshape(rows, ranks).sum(axis=1), minlength=q.groups)
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


def portfolio(q: Problem, *, split: bool, reorder: bool) -> Iterator[Keys]:
    """The starts, most promising first."""
    orders = microbatch_orders(q)[: 5 if reorder else 1]
    ranks = q.graph.ranks
    offsets = [np.zeros(ranks), np.full(ranks, BACKWARD_FIRST), np.arange(ranks, 0.0, -1.0) / 2, np.full(ranks, -2.0)]
    bounded = bool(q.bounded.any()) and q.graph.candidates > 1
    for shift in (0.0, 2.0, -2.0):
        for offset in offsets:
            for order in orders:
                for lean in (False, True) if bounded else (False,):
                    keys = make_keys(q, split)
                    keys.order_forward[:] = order
                    keys.order_backward[:] = order
                    keys.shift_forward[q.backbone] = shift
                    keys.offset[:] = offset
                    keys.flags[LEAN_AT_ONCE] = lean
                    keys.waits[WAIT_WEIGHT] = 0.3
                    yield keys
