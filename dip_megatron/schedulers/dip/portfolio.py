"""A few dozen list schedules from sensible priorities: good plans within milliseconds, and starts for the search."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...core.graph import Floats
from ...core.simulate.kernels import BACKWARD, FORWARD, FUSED
from .keys import ALTERNATE, LEAN_AT_ONCE, WAIT_WEIGHT, Keys, copy_keys, make_keys
from .problem import Problem

BACKWARD_FIRST = 1e6
BEGINS, STEPS = (0.0, 0.0, 0.02, 0.05, 0.1), (0.0, 0.0, 0.01, 0.02, 0.04)  # of an iteration: how long long ones wait
PRICED_SHARES = (0.3, 0.5, 0.75)  # of all bytes, that are given up for less than a price


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


def nested(q: Problem, *, split: bool) -> Iterator[Keys]:
    """Draws without end: units with long chains (of stages, one after the other) between those with short ones, which
    fill the pipeline before them and drain it after.

    A long chain that starts late is what all wait for at the end, and one that keeps its activations leaves no room for
    short ones beside it; short ones that have all run early leave nothing for the ranks that wait while long ones turn
    from forward to backward. So: some short ones first, the long ones, the other short ones, all in order of length,
    long and late ones held back for steps that are drawn; where memory matters, each stage's strategy by one price of a
    byte. Where a microbatch ends in one unit, that and those before it go together.
    """
    draw = np.random.default_rng(0)
    job, longest = _jobs(q)
    jobs = len(longest)
    up = np.argsort(longest, kind="stable")
    bases = [_by_price(q, price) for price in _prices(q)] if q.bounded.any() and q.graph.candidates > 1 else []
    while True:
        many = max(1, int(draw.uniform(0.15, 0.65) * jobs))
        short, long = up[: jobs - many], up[jobs - many :][:: draw.choice((1, -1))]
        head = int(draw.integers(0, len(short) + 1))
        begin, step, apart = (float(draw.choice(x)) for x in (BEGINS, STEPS, STEPS))
        release, place = np.zeros(jobs), np.empty(jobs)
        release[long] = q.horizon * (begin + step * np.arange(many))
        release[short[head:]] = q.horizon * apart * np.arange(len(short) - head) * q.groups / jobs
        place[np.concatenate([short[:head], long, short[head:]])] = np.arange(jobs) * q.groups / jobs
        keys = make_keys(q, split)
        first = np.full(q.groups, np.inf)
        np.minimum.at(first, q.group[job >= 0], place[job[job >= 0]])
        order = np.empty(q.groups)
        order[np.argsort(first, kind="stable")] = np.arange(q.groups)
        keys.order_forward[:] = order
        keys.order_backward[:] = order
        shift = np.where(job >= 0, place[job], first[q.group]) - order[q.group]
        keys.shift_forward[:] = shift
        keys.shift_backward[:] = shift
        keys.release[:] = np.where(job >= 0, release[job], 0.0)
        if bases:
            keys.base[:] = bases[draw.integers(len(bases))]
        keys.flags[ALTERNATE] = draw.random() < 0.75
        keys.waits[WAIT_WEIGHT] = draw.choice((0.0, 0.3, 0.6))
        yield keys


def _jobs(q: Problem) -> tuple[NDArray[np.int64], Floats]:
    """What is placed as one: a microbatch where none ends in several units, else such a unit. Of each virtual
    microbatch its job, or -1 if it goes with the first of its microbatch's and isn't held back; of each job the seconds
    of its longest unit, one stage after the other."""
    seconds = np.bincount(q.unit, weights=_whole(q)[0].reshape(-1, q.graph.ranks).sum(axis=1))[q.unit]
    ends = np.unique(q.unit[q.backbone])
    job = q.group.astype(np.int64)
    if len(ends) > q.groups:
        job = np.where(q.backbone, np.searchsorted(ends, q.unit), -1)
    longest = np.zeros(job.max() + 1)
    np.maximum.at(longest, job[job >= 0], seconds[job >= 0])
    return job, longest


def _whole(q: Problem) -> Floats:
    """Seconds of each stage's forward and backward by strategy, ``[C, N]``."""
    duration = q.graph.duration
    back = np.where(q.graph.has_weight, duration[FUSED], np.where(q.graph.has_backward, duration[BACKWARD], 0.0))
    whole: Floats = duration[FORWARD] + back
    return whole


def _prices(q: Problem) -> list[float]:
    """Seconds of a count of memory for which these shares of all of it are given up."""
    seconds, size = _whole(q), q.activation.astype(np.float64)
    saved = size[0] - size
    ratio = np.divide(seconds - seconds[0], saved, out=np.full_like(seconds, np.inf), where=saved > 0.5 * size[0])
    ratio = np.maximum(ratio.min(axis=0), 0.0)
    known = np.flatnonzero(np.isfinite(ratio) & (size[0] > 0.0))
    if not len(known):
        return []
    known = known[np.argsort(ratio[known], kind="stable")]
    given = np.cumsum(size[0][known]) / size[0][known].sum()
    return list(dict.fromkeys(1.001 * float(ratio[known[np.searchsorted(given, x)]]) for x in PRICED_SHARES))


def _by_price(q: Problem, price: float) -> NDArray[np.int8]:
    """Each stage's cheapest strategy where a count of memory costs ``price`` seconds, ``[N]``; none past its leanest,
    which has to stay in reach."""
    cheapest = (_whole(q) + price * q.activation).argmin(axis=0)
    return np.minimum(cheapest, q.activation.argmin(axis=0)).astype(np.int8)


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
