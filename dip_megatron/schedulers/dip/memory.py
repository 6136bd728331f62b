"""Choosing memory strategies for a given order of a rank: greedily, and as the paper does (its search, phase c).

A rank's memory depends on its own order alone, so ranks are independent: pick one candidate per stage, least total
time, within the capacity at every start of a forward.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from ...core.graph import Floats, Ints
from ...core.simulate.compiled import compiled
from ...core.simulate.kernels import BACKWARD, FORWARD, FUSED, WEIGHT, replay
from .dispatch import dispatch
from .keys import Keys
from .problem import Problem
from .queues import insertion_sort
from .work import Work

NODES = 1
"""Of HiGHS's branch and bound, where schedules are counted rather than seconds. The root, with its cuts and heuristics,
is within the gap for the models of the paper; ten nodes or a hundred gave the same strategies."""


class Refill(NamedTuple):
    """Buffers of :func:`evaluate`: the simulator's, and those that spend memory left over. ``gain`` ``[3]``: by which
    factor filling memory shortened the last schedule; by how much it may shorten one; and did a walk's current one."""

    start: Floats
    end: Floats
    at: Ints
    forward_end: Floats
    backward_end: Floats
    profile: NDArray[np.int64]
    place: Ints
    rating: Floats
    ranked: Ints
    gain: Floats


def make_refill(q: Problem) -> Refill:
    """Buffers for ``q``."""
    virtual_microbatches, ranks = q.graph.virtual_microbatches, q.graph.ranks
    return Refill(
        start=np.zeros((ranks, 3 * virtual_microbatches)),
        end=np.zeros((ranks, 3 * virtual_microbatches)),
        at=np.zeros(ranks, dtype=np.int32),
        forward_end=np.zeros(virtual_microbatches * ranks),
        backward_end=np.zeros(virtual_microbatches * ranks),
        profile=np.zeros(3 * virtual_microbatches, dtype=np.int64),
        place=np.zeros((3, virtual_microbatches), dtype=np.int32),
        rating=np.zeros(virtual_microbatches),
        ranked=np.zeros(virtual_microbatches, dtype=np.int32),
        gain=np.array([1.0, 1.2, 1.2]),
    )


@compiled
def fill_memory(q: Problem, p: int, order: Ints, length: int, strategy: NDArray[np.int8], r: Refill) -> None:
    """Give the stages of rank ``p`` faster strategies while memory lasts, most seconds saved per byte first; the given
    ``strategy`` ``[N]`` must fit."""
    g = q.graph
    virtual_microbatches, ranks = g.virtual_microbatches, g.ranks
    duration, has_backward, has_weight = g.duration, g.has_backward, g.has_weight
    activation, deferred_activation, capacity = q.activation, q.deferred_activation, q.capacity[p]
    profile, place, rating, ranked = r.profile, r.place, r.rating, r.ranked
    # place: where the stage's F, B and W stand; profile: bytes held from the start of an operation to that of the next.
    held = np.int64(0)
    for s in range(virtual_microbatches):
        place[1, s] = -1
        place[2, s] = -1
    for i in range(length):
        code = order[i]
        kind = code // virtual_microbatches
        s = code - kind * virtual_microbatches
        n = s * ranks + p
        c = strategy[n]
        if kind == FORWARD:
            place[0, s] = i
            place[1, s] = i + 1
            place[2, s] = i + 1
            profile[i] = held + activation[c, n]
            if has_backward[n]:
                held += activation[c, n]
        else:
            if kind == WEIGHT:
                held -= deferred_activation[c, n]
            else:
                place[1, s] = i
                held -= activation[c, n]
                if kind == BACKWARD and has_weight[n]:
                    held += deferred_activation[c, n]
            place[2, s] = i
            profile[i] = held
    for s in range(virtual_microbatches):
        n = s * ranks + p
        c = strategy[n]
        saved = duration[FORWARD, c, n] - duration[FORWARD, 0, n]
        if has_backward[n]:
            saved += duration[BACKWARD, c, n] - duration[BACKWARD, 0, n]
            if has_weight[n]:
                saved += duration[WEIGHT, c, n] - duration[WEIGHT, 0, n]
        rating[s] = -saved / max(1.0, float(activation[0, n] - activation[c, n]))
        ranked[s] = s
    insertion_sort(ranked, rating)
    for k in range(virtual_microbatches):
        s = ranked[k]
        n = s * ranks + p
        now = int(strategy[n])
        if rating[s] >= 0.0:
            break
        room, room_after = np.int64(1) << 60, np.int64(1) << 60
        for i in range(place[0, s], place[1, s]):
            room = min(room, capacity - profile[i])
        for i in range(place[1, s], place[2, s]):
            room_after = min(room_after, capacity - profile[i])
        for c in range(now):
            more, more_after = (
                activation[c, n] - activation[now, n],
                deferred_activation[c, n] - deferred_activation[now, n],
            )
            if more <= room and more_after <= room_after:
                for i in range(place[0, s], place[1, s]):
                    profile[i] += more
                for i in range(place[1, s], place[2, s]):
                    profile[i] += more_after
                strategy[n] = c
                break


@compiled
def evaluate(q: Problem, x: Keys, w: Work, r: Refill, limit: float) -> float:
    """Time of the list schedule of ``x`` after the memory that it leaves is filled with faster strategies; inf if it is
    hopeless to stay under ``limit`` (seconds). Orders and strategies are left in ``w``."""
    leaner = False
    for p in range(q.graph.ranks):
        leaner = leaner or q.bounded[p]
    for n in range(len(x.base)):
        leaner = leaner or x.base[n] > 0
    leaner = leaner and q.graph.candidates > 1
    time = dispatch(q, x, w, limit * r.gain[1] if leaner else limit)
    r.gain[0] = 1.0
    if time == np.inf or not leaner:
        return time
    leaner = False
    for n in range(len(w.strategy)):
        leaner = leaner or w.strategy[n] > 0
    if not leaner:
        return time
    for p in range(q.graph.ranks):
        fill_memory(q, p, w.orders[p], w.lengths[p], w.strategy, r)
    filled = replay(q.graph, w.orders, w.lengths, w.strategy, r.start, r.end, r.at, r.forward_end, r.backward_end)
    r.gain[0] = time / filled if filled > 0.0 else 1.0
    return filled


def solve_memory(
    q: Problem, p: int, order: Ints, greedy: NDArray[np.int8], *, gap: float = 0.05, seconds: float | None = 1.0
) -> NDArray[np.int8] | None:
    """The paper's integer program for rank ``p`` and its ``order`` of forwards and fused backwards, with HiGHS: one of
    the candidates for each stage, least total latency, activations within the capacity at every start of a forward.

    ``greedy`` ``[S]`` is the warm start, as a bound on the objective (SciPy takes no initial solution). HiGHS ends
    after ``seconds`` or, with None, after a number of nodes, so that its result doesn't depend on the load of the
    machine. Returns strategies ``[S]``, or None if nothing better than ``greedy`` by more than ``gap`` was found.
    """
    g = q.graph
    virtual_microbatches, ranks, count = g.virtual_microbatches, g.ranks, g.candidates
    nodes = np.arange(virtual_microbatches) * ranks + p
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
        kind, s = divmod(code, virtual_microbatches)
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
    limit = float(extra[np.arange(virtual_microbatches), greedy].sum())
    if limit <= 0.0:
        return None
    unit = max(1.0, float(q.capacity[p]))
    line = np.array([x[0] for x in at_least]).repeat(count)
    column = (np.array([x[1] for x in at_least])[:, None] * count + np.arange(count)).ravel()
    weights = (size / unit).ravel()[column]
    memory = coo_array((weights, (line, column)), shape=(lines, virtual_microbatches * count)).tocsr()
    one = coo_array(
        (
            np.ones(virtual_microbatches * count),
            (np.arange(virtual_microbatches).repeat(count), np.arange(virtual_microbatches * count)),
        ),
        shape=(virtual_microbatches, virtual_microbatches * count),
    ).tocsr()
    result = milp(
        extra.ravel() / limit,
        integrality=np.ones(virtual_microbatches * count),
        bounds=Bounds(0.0, 1.0),
        constraints=[
            LinearConstraint(memory, -np.inf, 1.0),
            LinearConstraint(one, 1.0, 1.0),
            LinearConstraint((extra.ravel() / limit)[None], -np.inf, 1.0),
        ],
        options={"mip_rel_gap": gap, **({"node_limit": NODES} if seconds is None else {"time_limit": seconds})},
    )
    if result.x is None:
        return None
    chosen = result.x.reshape(virtual_microbatches, count).argmax(axis=1).astype(np.int8)
    return chosen if float(extra[np.arange(virtual_microbatches), chosen].sum()) < limit else None
