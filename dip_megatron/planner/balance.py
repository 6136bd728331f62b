"""Which replica trains which microbatch: an exchange between data-parallel replicas that makes them end together.

A job takes as long as its slowest replica. Under plans a replica takes what its work is worth, so work is what has to
be even: a microbatch is a vector of seconds over the pipeline's ranks, a replica costs the largest sum of them, and
what is made small is the cost of the costliest replica. Whole microbatches change places, starting from where they
are, so that few move. The result depends on the numbers alone: whoever gathered the same ones comes to the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..core import OperationGraph
from ..core.graph import Floats
from ..core.simulate.compiled import allocating

Places = NDArray[np.int64]
Mode = Literal["swap", "free"]

TOLERANCE = 1e-4
"""A swap has to lower the cost of the costliest replica by this share."""
PARTNERS = 24
"""Replicas that are looked at as partners first: the least costly ones."""
GOAL = 1.001
"""Slowest over mean at which an exchange ends: below that a move gains less than plans differ from one another."""


@dataclass(frozen=True, eq=False)
class Work:
    """What the microbatches of all replicas are worth: ``seconds`` and ``held`` (bytes of activations) ``[M, P]``, and
    the replica ``[M]`` that has each now. Those of ``stays`` ``[M]`` can't move (None: all can). Raises ValueError
    where they don't belong together."""

    seconds: Floats
    held: Floats
    replica: Places
    replicas: int
    stays: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        count = len(self.seconds)
        if self.seconds.ndim != 2 or self.held.shape != self.seconds.shape or self.replica.shape != (count,):
            raise ValueError(
                f"seconds {self.seconds.shape} and held {self.held.shape} must be [microbatches, ranks], "
                f"replica {self.replica.shape} one number each"
            )
        if self.stays is not None and self.stays.shape != (count,):
            raise ValueError(f"stays {self.stays.shape} must be one a microbatch")
        if not np.all(np.isfinite(self.seconds)) or np.any(self.seconds < 0):
            raise ValueError("seconds must be finite and not negative")
        if count and not (int(self.replica.min()) >= 0 and int(self.replica.max()) < self.replicas):
            raise ValueError(f"replica must be 0 to {self.replicas - 1}")

    def cost(self, replica: Places) -> Floats:
        """Seconds ``[replicas]`` that each takes if ``replica`` says who trains what: its busiest rank's sum."""
        return self.sums(self.seconds, replica).max(axis=1)

    def sums(self, values: Floats, replica: Places) -> Floats:
        """``values`` ``[M, P]`` added up by replica, ``[replicas, P]``."""
        sums = np.zeros((self.replicas, values.shape[1]))
        np.add.at(sums, replica, values)
        return sums


@dataclass(frozen=True, eq=False)
class Assignment:
    """``replica`` ``[M]``: who trains each microbatch. ``before`` and ``after`` are the seconds ``[replicas]`` that
    each replica is expected to take."""

    replica: Places
    moved: NDArray[np.bool_]
    before: Floats
    after: Floats

    @property
    def gain(self) -> float:
        """The job's time before over its time after."""
        return float(self.before.max() / self.after.max()) if self.after.size and self.after.max() > 0 else 1.0

    def digest(self) -> str:
        """Equal for equal assignments; what replicas compare before they move anything."""
        return hashlib.sha256(self.replica.astype(np.int64).tobytes()).hexdigest()


def microbatch_work(graph: OperationGraph) -> tuple[Floats, Floats]:
    """Seconds and bytes of activations ``[microbatches, ranks]`` of one replica's batch, from its stage graph: forwards
    and backwards of all units of a microbatch, each with the fastest strategy; frozen parts have no backward."""
    return _of_microbatches(graph, _seconds(graph)), _of_microbatches(graph, graph.activation[0])


def meeting_work(graph: OperationGraph, meets: NDArray[np.bool_]) -> Floats:
    """Seconds as :func:`microbatch_work` gives them, of the stages ``[S, P]`` alone that meet others' of replicas that
    share experts, without their weight gradients."""
    backward = np.where(graph.has_backward, graph.backward[0], 0.0)
    return _of_microbatches(graph, np.where(meets, graph.forward[0] + backward, 0.0))


def _seconds(graph: OperationGraph) -> Floats:
    backward = np.where(graph.has_weight, graph.fused[0], graph.backward[0])
    return np.asarray(graph.forward[0] + np.where(graph.has_backward, backward, 0.0))


def _of_microbatches(graph: OperationGraph, values: Floats) -> Floats:
    """``values`` ``[S, P]`` added up by microbatch."""
    owner = np.array([graph.units[int(unit)].microbatch for unit in graph.unit_of])
    out = np.zeros((1 + int(owner.max()), graph.ranks))
    np.add.at(out, owner, values)
    return out


def assign(work: Work, mode: Mode = "swap", goal: float = GOAL) -> Assignment:
    """Exchange microbatches until the costliest replica takes at most ``goal`` times the mean, or nothing lowers it.

    ``swap`` keeps how many microbatches each replica has; ``free`` changes that where swapping alone stays above
    ``goal``, which changes a mean of losses unless the loop weights them by tokens. No replica gets to hold more than
    the fullest one did before.
    """
    found = _assigned(work, goal, moves=False)
    if mode == "free" and found.after.max() > goal * found.after.mean():
        other = _assigned(work, goal, moves=True)
        if other.after.max() < found.after.max() * (1 - TOLERANCE):
            return other
    return found


def _assigned(work: Work, goal: float, moves: bool) -> Assignment:
    start = work.replica.astype(np.int64)
    replica = start.copy()
    seconds, held = work.sums(work.seconds, start), work.sums(work.held, start)
    stays = np.zeros(len(start), dtype=np.bool_) if work.stays is None else work.stays
    arrays = (
        np.ascontiguousarray(work.seconds), np.ascontiguousarray(work.held), stays, replica, seconds, held,
        held.max(initial=0.0) * (1 + 1e-9), goal,
    )  # fmt: skip
    if moves:
        _move(*arrays)
    _swap(*arrays)
    return Assignment(replica, replica != start, work.cost(start), work.cost(replica))


def lines(before: Places, after: Places, replicas: int) -> list[list[int]]:
    """The numbers of the microbatches that each replica trains, in its order, if they go from ``before`` to ``after``
    ``[M]``: those that stay keep their places, and those that come take the places that have become free."""
    out = []
    for r in range(replicas):
        coming = iter(np.flatnonzero((after == r) & (before != r)))
        line = []
        for number in np.flatnonzero(before == r):
            taken = number if after[number] == r else next(coming, None)
            if taken is not None:
                line.append(int(taken))
        out.append(line + [int(number) for number in coming])
    return out


@allocating
def _swap(
    work: Floats, bytes_of: Floats, stays: NDArray[np.bool_], replica: Places, seconds: Floats, held: Floats,
    most: float, goal: float,
) -> None:  # fmt: skip
    """Swap in place. ``seconds`` and ``held`` ``[replicas, ranks]`` are the sums of ``replica``'s places."""
    replicas, count = seconds.shape[0], work.shape[0]
    size = np.zeros(replicas, dtype=np.int64)
    for m in range(count):
        size[replica[m]] += 1
    members = np.zeros((replicas, max(1, int(size.max()))), dtype=np.int64)
    size[:] = 0
    for m in range(count):
        r = replica[m]
        members[r, size[r]] = m
        size[r] += 1
    cost = np.empty(replicas)
    for r in range(replicas):
        cost[r] = seconds[r].max()
    for _ in range(4 * count):
        worst = int(np.argmax(cost))
        if cost[worst] <= goal * cost.mean():
            return
        order = np.argsort(cost)
        best, best_i, best_r, best_j = cost[worst] * (1 - TOLERANCE), -1, -1, -1
        for n in range(replicas):
            if n >= PARTNERS and best_i >= 0:
                break
            r = order[n]
            if r == worst:
                continue
            for i in range(size[worst]):
                if stays[members[worst, i]]:
                    continue
                for j in range(size[r]):
                    if stays[members[r, j]]:
                        continue
                    after = _after_swap(
                        work, bytes_of, seconds, held, worst, members[worst, i], r, members[r, j], most, best
                    )
                    if after < best:
                        best, best_i, best_r, best_j = after, i, r, j
        if best_i < 0:
            return
        mine, other = members[worst, best_i], members[best_r, best_j]
        for p in range(seconds.shape[1]):
            seconds[worst, p] += work[other, p] - work[mine, p]
            seconds[best_r, p] += work[mine, p] - work[other, p]
            held[worst, p] += bytes_of[other, p] - bytes_of[mine, p]
            held[best_r, p] += bytes_of[mine, p] - bytes_of[other, p]
        replica[mine], replica[other] = best_r, worst
        members[worst, best_i], members[best_r, best_j] = other, mine
        cost[worst], cost[best_r] = seconds[worst].max(), seconds[best_r].max()


@allocating
def _after_swap(
    work: Floats, bytes_of: Floats, seconds: Floats, held: Floats, a: int, mine: int, b: int, other: int, most: float,
    best: float,
) -> float:  # fmt: skip
    """The greater cost of replicas ``a`` and ``b`` once they have swapped; infinite if it is no better than ``best`` or
    one of them would hold more than ``most``."""
    after = 0.0
    for p in range(seconds.shape[1]):
        leaves = work[mine, p] - work[other, p]
        after = max(after, seconds[a, p] - leaves, seconds[b, p] + leaves)
        if after >= best:
            return np.inf
        heavier = bytes_of[mine, p] - bytes_of[other, p]
        if held[a, p] - heavier > most or held[b, p] + heavier > most:
            return np.inf
    return after


@allocating
def _move(
    work: Floats, bytes_of: Floats, stays: NDArray[np.bool_], replica: Places, seconds: Floats, held: Floats,
    most: float, goal: float,
) -> None:  # fmt: skip
    """Give microbatches of the costliest replica to the cheapest one as long as that lowers the greater cost; each
    keeps at least one."""
    replicas, count, ranks = seconds.shape[0], work.shape[0], seconds.shape[1]
    size = np.zeros(replicas, dtype=np.int64)
    for m in range(count):
        size[replica[m]] += 1
    cost = np.empty(replicas)
    for r in range(replicas):
        cost[r] = seconds[r].max()
    for _ in range(count):
        worst, least = np.argmax(cost), np.argmin(cost)
        if size[worst] < 2 or cost[worst] <= goal * cost.mean():
            return
        best, chosen = cost[worst] * (1 - TOLERANCE), -1
        for m in range(count):
            if replica[m] != worst or stays[m]:
                continue
            after, fits = 0.0, True
            for p in range(ranks):
                after = max(after, seconds[worst, p] - work[m, p], seconds[least, p] + work[m, p])
                fits = fits and held[least, p] + bytes_of[m, p] <= most
            if fits and after < best:
                best, chosen = after, m
        if chosen < 0:
            return
        seconds[worst] -= work[chosen]
        seconds[least] += work[chosen]
        held[worst] -= bytes_of[chosen]
        held[least] += bytes_of[chosen]
        replica[chosen] = least
        size[worst] -= 1
        size[least] += 1
        cost[worst], cost[least] = seconds[worst].max(), seconds[least].max()
