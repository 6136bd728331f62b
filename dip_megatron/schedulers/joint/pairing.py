"""Which microbatches of coupled replicas meet: an order of microbatches within each replica, which changes no numbers
but the order of sums.

At every layer with experts all members of the group wait for the one whose microbatch is the longest, or whose encoder
was. Microbatches of like work should therefore meet: the k-th longest of every replica in slot k.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from ...core.experts import ExpertLayers
from ...core.graph import Floats, OperationGraph

Slots = NDArray[np.int64]
"""``[replicas, slots]``: the microbatch that each replica runs in each slot."""


def dip_pairing(seconds: Floats) -> NDArray[np.int64]:
    """The order in which one replica should give its microbatches to any schedule: longest first, ``seconds`` ``[M]``
    or ``[M, P]`` being what each takes in all (:func:`planner.balance.microbatch_work` gives them).

    Every replica sorts its own; nothing has to be exchanged. Equal ones keep their order. With as many microbatches in
    every replica, the k-th ones then are each replica's k-th longest.
    """
    worth = seconds if seconds.ndim == 1 else seconds.sum(axis=1)
    return np.argsort(-worth, kind="stable")


def slot_work(graph: OperationGraph, meets: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Seconds ``[M]`` of each microbatch, summed over ranks, in the stages that meet and in all others; forwards and
    backwards with the fastest strategies."""
    backward = np.where(graph.has_weight, np.minimum(graph.fused, graph.backward + graph.weight), graph.backward)
    seconds = (graph.forward + np.where(graph.has_backward, backward, 0.0)).min(axis=0)
    owner = np.array([graph.units[int(u)].microbatch for u in graph.unit_of])
    out = np.zeros((2, 1 + int(owner.max())))
    np.add.at(out[0], owner, np.where(meets, seconds, 0.0).sum(axis=1))
    np.add.at(out[1], owner, np.where(meets, 0.0, seconds).sum(axis=1))
    return out[0], out[1]


def as_they_come(graphs: Sequence[OperationGraph]) -> Slots:
    """Microbatch k of every replica in slot k. Raises ValueError unless all have as many."""
    counts = {1 + max(u.microbatch for u in graph.units) for graph in graphs}
    if len(counts) > 1:
        raise ValueError(f"coupled replicas must have equally many microbatches, these have {sorted(counts)}")
    return np.repeat(np.arange(counts.pop())[None], len(graphs), axis=0)


OWN_WEIGHTS = (1.0, 0.3)
"""Of a second of the longest own work of a slot beside one of the longest work that meets: replicas can make up for the
former while they wait, the less the more they have of it."""
SWEEPS = 20


def refined(meeting: Floats, own: Floats, slots: Slots, weight: float, kinds: Slots | None = None) -> Slots:
    """A pairing with a lesser sum, over the slots, of the longest work that meets and ``weight`` times the longest of
    each replica's own, ``[replicas, M]`` seconds by microbatch: in turns each replica's microbatches are put into slots
    anew, the best way there is while all others stay, each into one of its kind (:func:`kinds_of`; None: all are of
    one), as they are in ``slots``. Slots come back longest first."""
    slots = slots.copy()
    kinds = np.zeros_like(slots) if kinds is None else kinds
    meet, rest = (np.take_along_axis(x, slots, axis=1) for x in (meeting, own))
    kind = kinds[0][slots[0]]
    before = np.inf
    for _ in range(SWEEPS):
        for g in range(len(slots)):
            others = np.arange(len(slots)) != g
            longest_meet, longest_rest = (x[others].max(axis=0, initial=0.0)[None] for x in (meet, rest))
            cost = np.maximum(meeting[g][:, None], longest_meet) + weight * np.maximum(own[g][:, None], longest_rest)
            microbatch, slot = linear_sum_assignment(np.where(kinds[g][:, None] == kind[None], cost, np.inf))
            slots[g, slot] = microbatch
            meet[g], rest[g] = meeting[g][slots[g]], own[g][slots[g]]
        now = float(meet.max(axis=0).sum() + weight * rest.max(axis=0).sum())
        if now >= before * (1.0 - 1e-9):
            break
        before = now
    return slots[:, dip_pairing(meet.max(axis=0) + rest.max(axis=0))]


def kinds_of(graphs: Sequence[OperationGraph], experts: ExpertLayers) -> Slots:
    """Numbers ``[replicas, M]`` that are equal for microbatches that can meet: those with as many units of each module
    with experts."""
    with_experts = [name for name, rows in experts.modules if any(any(any(c) for c in row) for row in rows)]
    counts = np.zeros(
        (*as_they_come(graphs).shape, len(with_experts) + 1), dtype=np.int64
    )  # one more: there may be none
    for g, graph in enumerate(graphs):
        for unit in graph.units:
            if unit.module in with_experts:
                counts[g, unit.microbatch, with_experts.index(unit.module)] += 1
    found = np.unique(counts.reshape(-1, counts.shape[2]), axis=0, return_inverse=True)[1]
    return np.asarray(found.reshape(counts.shape[:2]), dtype=np.int64)


def pairings(graphs: Sequence[OperationGraph], experts: ExpertLayers) -> list[Slots]:
    """Pairings worth trying, without repetitions: by all work first, then with ever more weight on the work that meets,
    by that alone, and as the microbatches come; before them the best that refining any of these gave. Only those in
    which microbatches that can't meet don't, unless there are none."""
    each = [slot_work(graph, experts.meets(graph)) for graph in graphs]
    met, rest = (np.stack([pair[i] for pair in each]) for i in (0, 1))
    kinds = kinds_of(graphs, experts)
    mixes = ((1.0, 1.0), (1.0, 3.0), (0.0, 1.0), (1.0, 0.0))
    tried = [np.lexsort((-(own * rest + meeting * met), kinds), axis=1) for own, meeting in mixes]
    tried.append(as_they_come(graphs))
    plain = [slots for slots in tried if not np.ptp(np.take_along_axis(kinds, slots, axis=1), axis=0).any()]
    best = []
    for weight in OWN_WEIGHTS if plain else ():
        better = [refined(met, rest, slots, weight, kinds) for slots in plain]
        best.append(min(better, key=lambda slots: longest_work(met, rest, slots, weight)))
    out: list[Slots] = []
    for slots in (*best, *(plain or tried)):
        if not any(np.array_equal(slots, known) for known in out):
            out.append(slots)
    return out


def longest_work(meeting: Floats, own: Floats, slots: Slots, weight: float) -> float:
    """What :func:`refined` makes small, seconds."""
    meet, rest = (np.take_along_axis(x, slots, axis=1).max(axis=0).sum() for x in (meeting, own))
    return float(meet + weight * rest)
