"""Which replica trains which microbatch, and in which slot, where replicas are coupled: an exchange that makes the
slots of a group alike.

Coupled replicas meet at every layer with experts, slot by slot. Equal sums, which is all that replicas alone need
(:mod:`.balance`), leave them waiting for one another in every slot; so microbatches that meet must be alike, in what
they take where replicas meet and in all. Microbatches are sorted by their work and cut into blocks of a few classes;
inside a block they are sorted by what they take where replicas meet and cut into classes of one microbatch for every
replica of a group; classes are dealt to the groups, and each class to the replicas of its group, so that sums stay even
from slot to slot. Larger blocks would make the work where replicas meet more alike, and leave them waiting for one
another's encoders. The result depends on the numbers alone: whoever gathered the same ones comes to the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..core.graph import Floats
from .balance import Assignment, Places

CLASSES = 4
"""Classes of a block, at least."""


@dataclass(frozen=True, eq=False)
class CoupledWork:
    """What the microbatches of all replicas are worth: ``meeting`` and ``own`` ``[M, P]`` seconds in the stages that
    meet and in all others, and the replica ``[M]`` that has each now. Replicas ``i * group`` to ``(i + 1) * group - 1``
    are coupled. Raises ValueError where that can't be, or replicas have unequally many."""

    meeting: Floats
    own: Floats
    replica: Places
    replicas: int
    group: int

    def __post_init__(self) -> None:
        if self.meeting.shape != self.own.shape or self.meeting.ndim != 2 or len(self.meeting) != len(self.replica):
            raise ValueError(
                f"meeting {self.meeting.shape} and own {self.own.shape} must be [microbatches, ranks], "
                f"replica {self.replica.shape} one number each"
            )
        if self.group < 1 or self.replicas % self.group:
            raise ValueError(f"{self.replicas} replicas are no whole number of coupled groups of {self.group}")
        counts = np.bincount(self.replica, minlength=self.replicas)
        if len(counts) != self.replicas or len(set(counts.tolist())) != 1:
            raise ValueError(f"coupled replicas must have equally many microbatches, these have {sorted(set(counts))}")
        if not (np.all(np.isfinite(self.meeting + self.own)) and np.all(self.meeting >= 0) and np.all(self.own >= 0)):
            raise ValueError("seconds must be finite and not negative")

    @property
    def slots(self) -> int:
        """Microbatches of each replica."""
        return len(self.replica) // self.replicas


@dataclass(frozen=True, eq=False)
class CoupledAssignment(Assignment):
    """``replica`` and ``slot`` ``[M]``: who trains each microbatch, and in which slot. ``before`` and ``after``:
    seconds ``[groups]`` that each group is expected to take."""

    slot: Places

    def digest(self) -> str:
        """Equal for equal assignments; what replicas compare before they move anything."""
        return hashlib.sha256(np.stack([self.replica, self.slot]).astype(np.int64).tobytes()).hexdigest()

    def order(self, replica: int) -> Places:
        """The microbatches of a replica, slot by slot."""
        mine = np.flatnonzero(self.replica == replica)
        return mine[np.argsort(self.slot[mine], kind="stable")]


def group_cost(work: CoupledWork, replica: Places, slot: Places) -> Floats:
    """Seconds ``[groups]`` of each group: on its busiest rank, the longest of every slot where replicas meet, and the
    most that a replica has of its own."""
    ranks = work.meeting.shape[1]
    longest = np.zeros((work.replicas // work.group, work.slots, ranks))
    np.maximum.at(longest, (replica // work.group, slot), work.meeting)
    own = np.zeros((work.replicas, ranks))
    np.add.at(own, replica, work.own)
    return np.asarray((longest.sum(axis=1) + own.reshape(-1, work.group, ranks).max(axis=1)).max(axis=1))


def longest_first(work: CoupledWork, replica: Places) -> Places:
    """Slots ``[M]`` when each replica gives its microbatches longest first."""
    total = (work.meeting + work.own).sum(axis=1)
    slot = np.empty(len(replica), dtype=np.int64)
    for r in range(work.replicas):
        mine = np.flatnonzero(replica == r)
        slot[mine[np.argsort(-total[mine], kind="stable")]] = np.arange(len(mine))
    return slot


def assign_coupled(work: CoupledWork) -> CoupledAssignment:
    """Exchange microbatches so that the slots of each coupled group are alike and all groups end together."""
    start = longest_first(work, work.replica)
    before = group_cost(work, work.replica, start)
    groups = work.replicas // work.group
    replica, slot = _classes(work, max(groups, CLASSES) * work.group)
    if group_cost(work, replica, slot).max() >= before.max():
        replica, slot = work.replica.astype(np.int64), start
    else:
        replica = _at_home(work, replica)
    return CoupledAssignment(replica, replica != work.replica, before, group_cost(work, replica, slot), slot)


def _classes(work: CoupledWork, block: int) -> tuple[Places, Places]:
    """Blocks of so many microbatches of like work, cut into classes that are alike where replicas meet."""
    group, groups = work.group, work.replicas // work.group
    met, own = work.meeting.sum(axis=1), work.own.sum(axis=1)
    order = np.argsort(-(met + own), kind="stable")
    pieces = [order[i : i + block] for i in range(0, len(order), block)]
    order = np.concatenate([piece[np.argsort(-met[piece], kind="stable")] for piece in pieces])
    classes = order.reshape(-1, group)
    size = met[classes].max(axis=1) + own[classes].mean(axis=1)
    classes = classes[np.argsort(-size, kind="stable")]
    size = -np.sort(-size, kind="stable")
    replica, slot = np.empty(len(met), dtype=np.int64), np.empty(len(met), dtype=np.int64)
    load, count = np.zeros(groups), np.zeros(groups, dtype=np.int64)
    sums = np.zeros(work.replicas)
    for line, worth in zip(classes, size, strict=True):
        g = int(np.argmin(np.where(count < work.slots, load, np.inf)))
        members = line[np.argsort(-own[line], kind="stable")]
        places = g * group + np.argsort(sums[g * group : (g + 1) * group], kind="stable")
        replica[members], slot[members] = places, count[g]
        sums[places] += own[members]
        load[g] += worth
        count[g] += 1
    return replica, slot


def _at_home(work: CoupledWork, replica: Places) -> Places:
    """The same with groups, and replicas inside them, renamed so that as many microbatches as can be stay where they
    are."""
    stay = np.zeros((work.replicas, work.replicas))
    np.add.at(stay, (replica, work.replica), 1.0)
    groups, group = work.replicas // work.group, work.group
    inner = np.zeros((groups, groups))
    names = {}
    for a in range(groups):
        for b in range(groups):
            part = stay[a * group : (a + 1) * group, b * group : (b + 1) * group]
            rows, columns = linear_sum_assignment(-part)
            inner[a, b], names[a, b] = part[rows, columns].sum(), columns
    rename = np.empty(work.replicas, dtype=np.int64)
    for a, b in zip(*linear_sum_assignment(-inner), strict=True):
        rename[a * group : (a + 1) * group] = b * group + names[int(a), int(b)]
    return rename[replica]
