"""Choosing the memory strategies of one rank's order by prices of its memory.

Over a given order the choice is a linear program but for its integers: one strategy per stage, least extra time, what
is held within the capacity at every position. Its dual puts a price on the memory of each position. Prices rise where
too much is held and fall where there is room (subgradient steps of Polyak's length); each stage then takes the strategy
that is cheapest with what its bytes cost over their life, and the best choice that fits is taken. This takes some
milliseconds: it is for the best schedules found, not for each one tried.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.graph import Floats, Ints
from ...core.order import Schedule
from ...core.simulate.compiled import compiled
from ...core.simulate.kernels import BACKWARD, FORWARD, WEIGHT, pad_orders
from .memory import fill_memory, make_refill
from .problem import Problem

STEPS = 250
PATIENCE = 6  # steps without a better bound before they get shorter
SPARE = 0.01  # share of the capacity that prices keep free: most choices then fit


class Prices(NamedTuple):
    """``price`` ``[3S]``: seconds for the whole capacity of the rank over one position of its order; ``best``: those of
    the highest bound. The others are buffers: ``total`` ``[3S + 1]``, prices up to a position, ``over`` ``[3S + 1]``,
    what is held there beyond the capacity, as a share of it, ``place`` ``[3, S]`` where a stage's F, B and W stand,
    ``choice`` ``[S]``; ``extra`` ``[S, C]``, seconds that a stage of the rank takes longer with a strategy than with
    its fastest, ``held`` and ``kept`` ``[S, C]``, what it holds until its B and, if that is split, until its W."""

    price: Floats
    best: Floats
    total: Floats
    over: Floats
    place: Ints
    choice: NDArray[np.int8]
    extra: Floats
    held: Floats
    kept: Floats


def make_prices(q: Problem) -> Prices:
    """Nothing costs anything yet."""
    stages, candidates = q.graph.virtual_microbatches, q.graph.candidates
    return Prices(
        np.zeros(3 * stages), np.zeros(3 * stages), np.zeros(3 * stages + 1), np.zeros(3 * stages + 1),
        np.zeros((3, stages), dtype=np.int32), np.zeros(stages, dtype=np.int8), np.zeros((stages, candidates)),
        np.zeros((stages, candidates)), np.zeros((stages, candidates)),
    )  # fmt: skip


@compiled
def extra_time(q: Problem, c: int, n: int) -> float:
    """Seconds that a stage takes longer with strategy ``c`` than with its fastest."""
    duration = q.graph.duration
    extra = duration[FORWARD, c, n] - duration[FORWARD, 0, n]
    if q.graph.has_backward[n]:
        extra += duration[BACKWARD, c, n] - duration[BACKWARD, 0, n]
        if q.graph.has_weight[n]:
            extra += duration[WEIGHT, c, n] - duration[WEIGHT, 0, n]
    return float(extra)


@compiled
def _answer(q: Problem, p: int, length: int, x: Prices) -> float:
    """Each stage's cheapest strategy at the present prices, into ``choice``; ``over`` is then what they hold. Returns
    the sum of their costs, memory included, less the price of all memory: a lower bound on the extra time."""
    virtual_microbatches, candidates = q.graph.virtual_microbatches, q.graph.candidates
    capacity = float(q.capacity[p])
    value = 0.0
    for i in range(length):
        x.total[i + 1] = x.total[i] + x.price[i]
        x.over[i] = 0.0
    x.over[length] = 0.0
    for s in range(virtual_microbatches):
        f, b, w = x.place[0, s], x.place[1, s], x.place[2, s]
        early, late = x.total[b] - x.total[f], x.total[w] - x.total[b]
        best, least = 0, np.inf
        for c in range(candidates):
            cost = x.extra[s, c] + (x.held[s, c] * early + x.kept[s, c] * late) / capacity
            if cost < least:
                best, least = c, cost
        value += least
        x.choice[s] = best
        held, kept = x.held[s, best] / capacity, x.kept[s, best] / capacity
        x.over[f] += held
        x.over[b] -= held
        if w > b:
            x.over[b] += kept
            x.over[w] -= kept
    held = 0.0
    for i in range(length):
        held += x.over[i]
        x.over[i] = held - 1.0
    return float(value - x.total[length])


@compiled
def choose_by_prices(
    q: Problem, p: int, order: Ints, length: int, strategy: NDArray[np.int8], limit: float, x: Prices
) -> bool:
    """Write strategies for rank ``p`` and its ``order`` into ``strategy`` ``[N]`` that fit and take less than ``limit``
    seconds extra; False if none were found, and nothing is written."""
    virtual_microbatches, ranks = q.graph.virtual_microbatches, q.graph.ranks
    for s in range(virtual_microbatches):
        n = s * ranks + p
        for c in range(q.graph.candidates):
            x.extra[s, c] = extra_time(q, c, n)
            x.held[s, c] = float(q.activation[c, n])
            x.kept[s, c] = float(q.deferred_activation[c, n])
    for i in range(length):
        x.price[i] = 0.0
        kind = order[i] // virtual_microbatches
        s = order[i] - kind * virtual_microbatches
        if kind == FORWARD:
            x.place[0, s] = i
            x.place[1, s] = i + 1
            x.place[2, s] = i + 1
        elif kind == WEIGHT:
            x.place[2, s] = i
        else:
            x.place[1, s] = i
            x.place[2, s] = i
    # Steps start over from the best prices, half as long, where they no longer raise the bound.
    scale, bound, since, least = 1.0, -np.inf, 0, limit
    for _ in range(STEPS):
        value = _answer(q, p, length, x)
        if value <= bound:
            since += 1
            if since > PATIENCE:
                scale, since = 0.5 * scale, 0
                for i in range(length):
                    x.price[i] = x.best[i]
                value = _answer(q, p, length, x)
        if value > bound:
            bound, since = value, 0
            for i in range(length):
                x.best[i] = x.price[i]
        most, square = -np.inf, 0.0
        for i in range(length):
            most = max(most, x.over[i])
            if x.over[i] + SPARE > 0.0 or x.price[i] > 0.0:
                square += (x.over[i] + SPARE) ** 2
        if most <= 0.0:
            extra = 0.0
            for s in range(virtual_microbatches):
                extra += x.extra[s, x.choice[s]]
            if extra < least:
                least = extra
                for s in range(virtual_microbatches):
                    strategy[s * ranks + p] = x.choice[s]
        gap = limit - value
        if square <= 0.0 or gap <= 0.0:
            break
        for i in range(length):
            x.price[i] = max(0.0, x.price[i] + scale * gap / square * (x.over[i] + SPARE))
    return bool(least < limit)


@compiled
def extra_of_rank(q: Problem, p: int, strategy: NDArray[np.int8]) -> float:
    """Seconds that all stages of rank ``p`` take longer with ``strategy`` ``[N]`` than with their fastest."""
    extra = 0.0
    for s in range(q.graph.virtual_microbatches):
        n = s * q.graph.ranks + p
        extra += extra_time(q, int(strategy[n]), n)
    return extra


def refine_strategies(q: Problem, schedule: Schedule) -> Schedule:
    """``schedule`` with the same orders and, on ranks where that takes less extra time, strategies by prices. Its
    strategies must fit; so do those returned."""
    orders, lengths = pad_orders(schedule)
    strategy = np.ascontiguousarray(schedule.strategy.reshape(-1)).copy()
    virtual_microbatches, ranks = q.graph.virtual_microbatches, q.graph.ranks
    refill, prices = make_refill(q), make_prices(q)
    for p in range(ranks):
        extra = extra_of_rank(q, p, strategy)
        if q.bounded[p] and extra > 0.0 and choose_by_prices(q, p, orders[p], int(lengths[p]), strategy, extra, prices):
            fill_memory(q, p, orders[p], int(lengths[p]), strategy, refill)
    return Schedule(schedule.orders, strategy.reshape(virtual_microbatches, ranks))
