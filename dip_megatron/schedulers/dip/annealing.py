"""Simulated annealing on the keys of the list scheduler."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...core.graph import Floats
from ...core.simulate.compiled import compiled
from .keys import ALTERNATE, LEAN_AT_ONCE, WAIT_BETTER, WAIT_LEAN, WAIT_WEIGHT, Keys, assign_keys
from .memory import Refill, evaluate
from .problem import Problem
from .random import below, uniform
from .work import Work

MAY_REORDER, MAY_SPLIT, MAY_LEAN, MAY = 0, 1, 2, 3


@compiled
def _reinsert(order: Floats, group: int, place: int) -> None:
    """Move ``group`` to ``place`` of a permutation given as each group's place."""
    old = order[group]
    for i in range(len(order)):
        if old < order[i] <= place:
            order[i] -= 1
        elif place <= order[i] < old:
            order[i] += 1
    order[group] = place


@compiled
def _bend(q: Problem, shift: Floats, random: NDArray[np.uint64]) -> None:
    """Change the shift of one virtual microbatch, of a microbatch's backbone or of its others, or of all of a kind."""
    s = below(random, len(shift))
    scope = uniform(random)
    step = 4.0 * (uniform(random) + uniform(random) - 1.0)
    if uniform(random) < 0.15:
        step = -shift[s]
    for i in range(len(shift)):
        same_kind = q.backbone[i] == q.backbone[s]
        if (
            i == s
            or (scope >= 0.6 and scope < 0.75 and q.unit[i] == q.unit[s])
            or (scope < 0.6 and scope > 0.35 and same_kind and q.group[i] == q.group[s])
            or (scope < 0.1 and same_kind)
        ):
            shift[i] += step


@compiled
def _hold(q: Problem, release: Floats, random: NDArray[np.uint64]) -> None:
    """Change the time before which a unit, or those of a microbatch, don't start."""
    s = below(random, len(release))
    scope, which = uniform(random), uniform(random)
    time = 0.0
    if which < 0.4:
        time = uniform(random) * q.horizon
    elif which < 0.8:
        time = max(0.0, release[s] + 0.2 * q.horizon * (uniform(random) - 0.5))
    for i in range(len(release)):
        if q.unit[i] == q.unit[s] or (scope < 0.5 and q.group[i] == q.group[s]):
            release[i] = time


@compiled
def _lean(q: Problem, x: Keys, random: NDArray[np.uint64]) -> None:
    """Change the fastest strategy allowed: of a stage, a virtual microbatch, a microbatch on a rank, or a rank."""
    virtual_microbatches, ranks = q.graph.virtual_microbatches, q.graph.ranks
    if uniform(random) < 0.1:
        x.flags[LEAN_AT_ONCE] = not x.flags[LEAN_AT_ONCE]
        return
    s, p, scope = below(random, virtual_microbatches), below(random, ranks), uniform(random)
    choice = below(random, q.graph.candidates)
    if uniform(random) < 0.4:
        choice = 0
    for i in range(virtual_microbatches):
        same_kind = q.backbone[i] == q.backbone[s]
        for r in range(ranks):
            if scope < 0.35:
                hit = i == s and r == p
            elif scope < 0.6:
                hit = i == s
            elif scope < 0.85:
                hit = r == p and same_kind and q.group[i] == q.group[s]
            elif scope < 0.95:
                hit = r == p and same_kind
            else:
                hit = same_kind
            if hit:
                x.base[i * ranks + r] = choice


@compiled
def _fuse(q: Problem, x: Keys, random: NDArray[np.uint64]) -> None:
    """Split or fuse the backward of a stage, of a virtual microbatch, of a microbatch on a rank, or of a rank."""
    virtual_microbatches, ranks = q.graph.virtual_microbatches, q.graph.ranks
    s, p, scope, choice = (
        below(random, virtual_microbatches),
        below(random, ranks),
        uniform(random),
        uniform(random) < 0.5,
    )
    for i in range(virtual_microbatches):
        for r in range(ranks):
            if scope < 0.35:
                hit = i == s and r == p
            elif scope < 0.6:
                hit = i == s
            elif scope < 0.85:
                hit = r == p and q.group[i] == q.group[s]
            else:
                hit = r == p and q.backbone[i] == q.backbone[s]
            n = i * ranks + r
            if hit and q.graph.has_weight[n]:
                x.split[n] = choice


@compiled
def mutate(q: Problem, x: Keys, may: NDArray[np.bool_], random: NDArray[np.uint64]) -> None:
    """One random move on ``x``."""
    kind = uniform(random)
    if kind < 0.14 and may[MAY_LEAN]:
        _lean(q, x, random)
    elif kind < 0.20 and may[MAY_SPLIT]:
        _fuse(q, x, random)
    elif kind < 0.24 and may[MAY_REORDER]:
        _hold(q, x.release, random)
    elif kind < 0.30:
        which = uniform(random)
        if which < 0.25 and may[MAY_LEAN]:
            step = 1.0 if uniform(random) < 0.5 else -1.0
            one = below(random, len(x.window)) if uniform(random) < 0.6 else -1
            for p in range(len(x.window)):
                if one < 0 or p == one:
                    x.window[p] = min(max(1.0, x.window[p] + step), float(len(q.reservation)))
        elif which < 0.3:
            x.flags[ALTERNATE] = not x.flags[ALTERNATE]
        elif which < 0.5:
            x.waits[WAIT_WEIGHT] = max(0.0, 1.3 * uniform(random) - 0.1)
        elif which < 0.8:
            x.waits[WAIT_BETTER] = max(0.0, uniform(random) - 0.5)
        else:
            x.waits[WAIT_LEAN] = max(0.0, 2.0 * uniform(random) - 0.5)
    elif kind < 0.35:
        step = 4.0 * (uniform(random) + uniform(random) - 1.0)
        one = below(random, len(x.offset)) if uniform(random) < 0.7 else -1
        for p in range(len(x.offset)):
            if one < 0 or p == one:
                x.offset[p] += step
    elif kind < 0.52:
        _bend(q, x.shift_backward, random)
    elif kind < 0.70 or not may[MAY_REORDER] or q.groups < 2:
        _bend(q, x.shift_forward, random)
    else:
        group = below(random, q.groups)
        which = uniform(random)
        far = uniform(random) < 0.4
        jump = below(random, q.groups)
        near = 1 + below(random, 3)
        if uniform(random) < 0.5:
            near = -near
        if which < 0.75:
            place = jump if far else int(x.order_forward[group]) + near
            _reinsert(x.order_forward, group, min(max(place, 0), q.groups - 1))
        if which < 0.5 or which >= 0.75:
            place = jump if far else int(x.order_backward[group]) + near
            _reinsert(x.order_backward, group, min(max(place, 0), q.groups - 1))


@compiled
def anneal(
    q: Problem, current: Keys, trial: Keys, best: Keys, w: Work, f: Refill, may: NDArray[np.bool_],
    random: NDArray[np.uint64], values: Floats, heat: float, evaluations: int,
) -> None:  # fmt: skip
    """``evaluations`` steps of annealing at temperature ``heat`` (seconds). ``values`` ``[2]`` are the times of
    ``current`` and ``best``. The threshold is drawn before a schedule is tried, so that a hopeless one stops early."""
    assign_keys(trial, current)
    gain = f.gain[2]
    for _ in range(evaluations):
        mutate(q, trial, may, random)
        limit = values[0] - heat * np.log(1.0 - uniform(random))
        # Mostly give up early; now and then let a schedule show how much filling its memory gains.
        f.gain[1] = 1.02 * gain if uniform(random) < 0.6 else max(1.2, gain)
        time = evaluate(q, trial, w, f, limit)
        if time <= limit:
            assign_keys(current, trial)
            values[0] = time
            gain = max(1.0, f.gain[0])
            if time < values[1]:
                assign_keys(best, trial)
                values[1] = time
        else:
            assign_keys(trial, current)
    f.gain[2] = gain
