"""Choosing memory strategies for a given order of a rank: greedily, and as the paper does (its search, phase c).

A rank's memory depends on its own order alone, so ranks are independent: pick one candidate per stage, least total
time, within the capacity at every start of a forward.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from ..schedule.graph import Floats, Ints
from ..simulate.compiled import compiled
from ..simulate.kernels import BACKWARD, FORWARD, FUSED, WEIGHT
from .dispatch import insertion_sort
from .problem import Problem


@compiled
def _stage_seconds(q: Problem, c: int, n: int, split: bool) -> float:
    """Time of a stage pair with strategy ``c``."""
    g = q.graph
    seconds = g.duration[FORWARD, c, n]
    if g.has_backward[n]:
        if not g.has_weight[n]:
            seconds += g.duration[BACKWARD, c, n]
        elif split:
            seconds += g.duration[BACKWARD, c, n] + g.duration[WEIGHT, c, n]
        else:
            seconds += g.duration[FUSED, c, n]
    return float(seconds)


@compiled
def fill_memory(
    q: Problem, p: int, order: Ints, length: int, strategy: NDArray[np.int8], profile: NDArray[np.int64], first: Ints,
    last: Ints, rating: Floats, ranked: Ints,
) -> None:  # fmt: skip
    """Give the stages of rank ``p`` faster strategies while memory lasts, most seconds saved per byte first. The given
    ``strategy`` ``[N]`` must fit. Buffers: ``profile`` ``[3S]``, the others ``[S]``."""
    g = q.graph
    rows, ranks = g.rows, g.ranks
    # A backward that is split holds less until its weight gradient ends; that part does not depend on the strategy
    # chosen here by much, so it is kept as its largest.
    held = np.int64(0)
    for s in range(rows):
        first[s] = -1
        last[s] = -1
    for i in range(length):
        code = order[i]
        kind = code // rows
        s = code - kind * rows
        n = s * ranks + p
        size = q.activation[strategy[n], n]
        keep = q.hold[0, n]
        for c in range(1, g.candidates):
            keep = max(keep, q.hold[c, n])
        if kind == FORWARD:
            held += size
            first[s] = i
            last[s] = i
            profile[i] = held
            if not g.has_backward[n]:
                held -= size
        else:
            profile[i] = held
            if kind == WEIGHT:
                held -= keep
            else:
                last[s] = i
                held -= size
                if kind == BACKWARD and g.has_weight[n]:
                    held += keep
                    profile[i] = max(profile[i], held)
    for s in range(rows):
        n = s * ranks + p
        c = strategy[n]
        saved = _stage_seconds(q, c, n, False) - _stage_seconds(q, 0, n, False)
        rating[s] = -saved / max(1.0, float(q.activation[0, n] - q.activation[c, n]))
        ranked[s] = s
    insertion_sort(ranked, rating)
    for k in range(rows):
        s = ranked[k]
        n = s * ranks + p
        now = strategy[n]
        size = q.activation[now, n]
        room = np.int64(1) << 60
        for i in range(first[s], last[s] + 1):
            room = min(room, q.capacity[p] - profile[i])
        best, best_seconds = now, _stage_seconds(q, now, n, False)
        for c in range(g.candidates):
            seconds = _stage_seconds(q, c, n, False)
            if seconds < best_seconds and q.activation[c, n] - size <= room:
                best, best_seconds = c, seconds
        if best != now:
            for i in range(first[s], last[s] + 1):
                profile[i] += q.activation[best, n] - size
            strategy[n] = best


def solve_memory(
    q: Problem, p: int, order: Ints, greedy: NDArray[np.int8], *, gap: float = 0.05, seconds: float = 1.0
) -> NDArray[np.int8] | None:
    """The paper's integer program for rank ``p`` and its ``order`` of forwards and fused backwards, with HiGHS: one of
    the candidates for each stage, least total latency, activations within the capacity at every start of a forward.

    ``greedy`` ``[S]`` is the warm start, as a bound on the objective (SciPy takes no initial solution). Returns
    strategies ``[S]``, or None if nothing better than ``greedy`` by more than ``gap`` was found.
    """
    g = q.graph
    rows, ranks, count = g.rows, g.ranks, g.candidates
    nodes = np.arange(rows) * ranks + p
    has_weight, has_backward = g.has_weight[nodes], g.has_backward[nodes]
    back = np.where(
        has_weight, g.duration[FUSED][:, nodes], np.where(has_backward, g.duration[BACKWARD][:, nodes], 0.0)
    )
    cost = (g.duration[FORWARD][:, nodes] + back).T
    size = q.activation[:, nodes].T.astype(np.float64)
    alive: list[int] = []
    at_least: list[tuple[int, int]] = []
    lines = 0
    for code in order.tolist():
        kind, s = divmod(code, rows)
        if kind != FORWARD:
            alive.remove(s)
            continue
        alive.append(s)
        at_least += [(lines, held) for held in alive]
        lines += 1
        if not has_backward[s]:
            alive.remove(s)
    base = cost.min(axis=1)
    extra = cost - base[:, None]
    limit = float(extra[np.arange(rows), greedy].sum())
    if limit <= 0.0:
        return None
    unit = max(1.0, float(q.capacity[p]))
    line = np.array([x[0] for x in at_least]).repeat(count)
    column = (np.array([x[1] for x in at_least])[:, None] * count + np.arange(count)).ravel()
    weights = (size / unit).ravel()[column]
    memory = coo_array((weights, (line, column)), shape=(lines, rows * count)).tocsr()
    one = coo_array(
        (np.ones(rows * count), (np.arange(rows).repeat(count), np.arange(rows * count))), shape=(rows, rows * count)
    ).tocsr()
    result = milp(
        extra.ravel() / limit,
        integrality=np.ones(rows * count),
        bounds=Bounds(0.0, 1.0),
        constraints=[
            LinearConstraint(memory, -np.inf, 1.0),
            LinearConstraint(one, 1.0, 1.0),
            LinearConstraint((extra.ravel() / limit)[None], -np.inf, 1.0),
        ],
        options={"mip_rel_gap": gap, "time_limit": seconds},
    )
    if result.x is None:
        return None
    chosen = result.x.reshape(rows, count).argmax(axis=1).astype(np.int8)
    return chosen if float(extra[np.arange(rows), chosen].sum()) < limit else None
