"""Bounds on an iteration from how long activations are held: argument 4 of :mod:`.bounds`.

Twice: with what a stage really holds, and with less, growing evenly while its forward runs and shrinking evenly while
its backward does, the weight gradient's part while that does. What is held then rises and falls no faster than the
fastest forward and backward allow, so that memory is half empty while it fills, and while it drains.
"""

from __future__ import annotations

import numpy as np

from .graph import Floats, Ints, OperationGraph
from .simulate.compiled import compiled
from .simulate.kernels import BACKWARD, FORWARD, FUSED, WEIGHT, GraphArrays

PRICES = np.concatenate([[0.0], np.logspace(-3.0, 2.0, 61)])
"""Of holding all memory for a second, in seconds."""


@compiled
def _round_trips(
    order: Ints, after_start: Ints, after: Ints, transfer: Floats, f: Floats, b: Floats, ranks: int, out: Floats
) -> None:
    """Least seconds from the end of each node's forward to the start of its backward, into ``out`` ``[N]``.

    ``order`` are the nodes in topological order; f and b their least forwards and input gradients. Of several nodes
    that follow one on one rank all run in between: forwards before the last one's own way there and back, backwards
    after the first one's.
    """
    for i in range(len(order) - 1, -1, -1):
        n = order[i]
        longest, near, same = 0.0, np.inf, True
        forwards, backwards, there, back = 0.0, 0.0, np.inf, np.inf
        for e in range(after_start[n], after_start[n + 1]):
            m = after[e]
            same = same and m % ranks == after[after_start[n]] % ranks
            longest = max(longest, 2.0 * transfer[e] + f[m] + out[m] + b[m])
            near = min(near, transfer[e])
            forwards += f[m]
            backwards += b[m]
            there = min(there, f[m] + out[m])
            back = min(back, out[m] + b[m])
        if same and near < np.inf:
            several = max(forwards + backwards, max(forwards + back, there + backwards))
            longest = max(longest, 2.0 * near + several)
        out[n] = longest


def held_memory(
    graph: OperationGraph, g: GraphArrays, order: Ints, least: tuple[Floats, Floats], whole: Floats, head: Floats,
    idle: Floats, proven: float, *, split: bool,
) -> Floats:  # fmt: skip
    """Seconds that each rank's plan takes at least, ``[P]``, 0 where memory has no limit.

    ``order``: forwards in topological order; ``least``: least forward and input gradient of every node; ``whole``: its
    backward by strategy ``[C, N]``; ``head``: of forwards, ``[N]``; ``idle``: the rank's time ``[2, P]`` in which no
    backward runs and no more than forwards of least durations, before it is filled and after its last operation;
    ``proven``: seconds that any plan takes.
    """
    f, b, w, fused = (g.duration[k] for k in (FORWARD, BACKWARD, WEIGHT, FUSED))
    trip = np.zeros(g.virtual_microbatches * g.ranks)
    _round_trips(order, g.after_start, g.after, g.after_transfer, *least, g.ranks, trip)
    seconds = least[0] + np.where(g.has_backward, whole, 0.0)
    out = np.zeros(g.ranks)
    for share in (1.0, 0.5):  # of its forward and of its backward, for which a stage's activations count
        apart = g.activation * (share * (f + b) + trip) + np.where(g.has_weight, share * g.deferred_activation * w, 0.0)
        at_once = g.activation * (share * (f + fused) + trip)
        held = np.where(g.has_weight, np.minimum(apart, at_once) if split else at_once, apart)
        held = np.where(g.has_backward, held, g.activation * f * (share == 1.0))
        for p in range(g.ranks):
            room = float(graph.memory_limit[p] - graph.static_bytes[p])
            if not np.isfinite(room) or room <= 0:
                continue
            n = np.arange(p, len(trip), g.ranks, dtype=np.int32)
            empty = float(head[n].min() + idle[1, p])
            if share < 1.0:
                filled, drained = _ramps(g, n, room)
                if not proven >= empty + filled + drained:
                    continue
                empty += (filled + drained) / 2.0
            own, part = np.ascontiguousarray(seconds[:, n]), held[:, n] / room
            fastest = np.take_along_axis(part, own.argmin(axis=0)[None], axis=0).sum()
            if fastest + empty > proven:  # else no price makes more of it
                out[p] = max(out[p], _priced(PRICES, own, part, float(idle[:, p].sum()), empty))
    return out


@compiled
def _priced(prices: Floats, own: Floats, part: Floats, idle: float, empty: float) -> float:
    """The best bound of some prices: seconds ``own`` and, with all memory, seconds of memory ``part`` ``[C, n]``."""
    best = 0.0
    for price in prices:
        total = idle + price * empty
        for n in range(own.shape[1]):
            least = np.inf
            for c in range(own.shape[0]):
                least = min(least, own[c, n] + price * part[c, n])
            total += least
        best = max(best, total / (1.0 + price))
    return best


def _ramps(g: GraphArrays, n: Ints, room: float) -> tuple[float, float]:
    """Least seconds in which forwards of the nodes ``n`` fill ``room`` bytes, and in which backwards free them."""

    def fastest(size: Floats, seconds: Floats) -> float:
        seconds = np.broadcast_to(seconds, size.shape)
        rates = np.divide(size, seconds, out=np.full_like(size, np.inf), where=seconds > 0)
        return float(np.where(size > 0, rates, 0.0).max())

    f, b, w = (g.duration[k][:, n] for k in (FORWARD, BACKWARD, WEIGHT))
    b = np.minimum(b, g.duration[FUSED][:, n])
    # What a weight gradient waits with is there only once the stage's forward and backward have run.
    grows = max(fastest(g.activation[:, n], f), fastest(g.deferred_activation[:, n], f.min(axis=0) + b.min(axis=0)))
    shrinks = max(fastest(g.activation[:, n], b), fastest(g.deferred_activation[:, n], w))
    return room / max(grows, 1e-300), room / max(shrinks, 1e-300)
