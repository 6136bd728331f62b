"""Samples that change microbatches: what evens replicas further where whole microbatches are too few, or too large.

A loop that packs its own samples (documents, clips) into microbatches can pack them anew. After whole microbatches have
changed places (:mod:`.balance`), samples of the costliest replica's move into microbatches of others that have room, or
swap with samples there, until all end together. A sample is worth what its microbatch is worth with it less what it
would be worth without; a microbatch keeps at least one sample, and never gets longer than the loop packs. The result
depends on the numbers alone: whoever gathered the same ones comes to the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.graph import Floats
from ..core.simulate.compiled import allocating
from .balance import GOAL, PARTNERS, TOLERANCE, Places, Work


@dataclass(frozen=True, eq=False)
class SampleWork:
    """What the samples of all microbatches are worth: ``seconds`` and ``held`` (bytes of activations) ``[S, P]``,
    ``tokens`` ``[S]``, and the microbatch ``[S]`` that has each now, numbered over all replicas as in :class:`.Work`.
    Those of ``stays`` ``[S]`` can't move. ``room`` ``[M]``: tokens that a microbatch can take yet. Raises ValueError
    where they don't belong together."""

    seconds: Floats
    held: Floats
    tokens: Places
    microbatch: Places
    stays: NDArray[np.bool_]
    room: Places

    def __post_init__(self) -> None:
        count = len(self.seconds)
        shapes = {len(self.held), len(self.tokens), len(self.microbatch), len(self.stays)}
        if self.seconds.shape != self.held.shape or shapes != {count}:
            raise ValueError("seconds and held must be [samples, ranks], tokens, microbatch and stays one a sample")
        if count and not (int(self.microbatch.min()) >= 0 and int(self.microbatch.max()) < len(self.room)):
            raise ValueError(f"microbatch must be 0 to {len(self.room) - 1}")


@dataclass(frozen=True, eq=False)
class Resampling:
    """``microbatch`` ``[S]``: who holds each sample afterwards; ``after``: seconds ``[replicas]`` that each replica is
    expected to take then."""

    microbatch: Places
    moved: NDArray[np.bool_]
    after: Floats


def resample(samples: SampleWork, work: Work, replica: Places, goal: float = GOAL) -> Resampling:
    """Move samples between microbatches of different replicas until the costliest replica takes at most ``goal`` times
    the mean, or nothing lowers it. ``replica`` ``[M]`` says who trains which microbatch, those of ``work``. No replica
    gets to hold more than the fullest one did before anything moved."""
    start = samples.microbatch.astype(np.int64)
    microbatch = start.copy()
    seconds, held = work.sums(work.seconds, replica), work.sums(work.held, replica)
    most = float(work.sums(work.held, work.replica).max(initial=0.0)) * (1 + 1e-9)
    _exchange(
        np.ascontiguousarray(samples.seconds), np.ascontiguousarray(samples.held), samples.tokens.astype(np.int64),
        samples.stays, microbatch, replica.astype(np.int64), samples.room.astype(np.int64), seconds, held,
        np.bincount(start, minlength=len(samples.room)), most, goal,
    )  # fmt: skip
    return Resampling(microbatch, microbatch != start, seconds.max(axis=1))


@allocating
def _exchange(
    work: Floats, bytes_of: Floats, tokens: Places, stays: NDArray[np.bool_], microbatch: Places, replica: Places,
    room: Places, seconds: Floats, held: Floats, count: Places, most: float, goal: float,
) -> None:  # fmt: skip
    """Move and swap in place. ``seconds`` and ``held`` ``[replicas, ranks]`` are the replicas' sums, ``count`` and
    ``room`` ``[M]`` the samples of each microbatch and the tokens it can take yet."""
    replicas, samples = seconds.shape[0], work.shape[0]
    cost = np.empty(replicas)
    for r in range(replicas):
        cost[r] = seconds[r].max()
    home = replica[microbatch]
    for _ in range(4 * samples):
        worst = int(np.argmax(cost))
        if cost[worst] <= goal * cost.mean():
            return
        mine = np.flatnonzero((home == worst) & ~stays)
        best, best_i, best_j, best_pack = cost[worst] * (1 - TOLERANCE), -1, -1, -1
        order = np.argsort(cost)
        for n in range(replicas):
            if n >= PARTNERS and best_i >= 0:
                break
            r = order[n]
            if r == worst:
                continue
            theirs = np.flatnonzero((home == r) & ~stays)
            pack = _roomiest(room, replica, r)
            for n_i in range(len(mine)):
                i = mine[n_i]
                a = microbatch[i]
                if count[a] > 1 and pack >= 0 and tokens[i] <= room[pack]:
                    after = _after(work, bytes_of, seconds, held, worst, i, r, -1, most, best)
                    if after < best:
                        best, best_i, best_j, best_pack = after, i, -1, pack
                for n_j in range(len(theirs)):
                    j = theirs[n_j]
                    b, more = microbatch[j], tokens[i] - tokens[j]
                    if more > room[b] or -more > room[a]:
                        continue
                    after = _after(work, bytes_of, seconds, held, worst, i, r, j, most, best)
                    if after < best:
                        best, best_i, best_j, best_pack = after, i, j, b
        if best_i < 0:
            return
        _place(work, bytes_of, tokens, microbatch, room, count, seconds, held, home, replica, best_i, best_j, best_pack)
        other = replica[best_pack]
        cost[worst], cost[other] = seconds[worst].max(), seconds[other].max()


@allocating
def _roomiest(room: Places, replica: Places, r: int) -> int:
    """The microbatch of replica ``r`` that can take most tokens; -1 if it has none."""
    found = -1
    for m in range(len(room)):
        if replica[m] == r and (found < 0 or room[m] > room[found]):
            found = m
    return found


@allocating
def _after(
    work: Floats, bytes_of: Floats, seconds: Floats, held: Floats, a: int, i: int, b: int, j: int, most: float,
    best: float,
) -> float:  # fmt: skip
    """The greater cost of replicas ``a`` and ``b`` once sample ``i`` has gone to ``b``, and ``j`` to ``a`` (-1: none);
    infinite if it is no better than ``best`` or one of them would hold more than ``most``."""
    after = 0.0
    for p in range(seconds.shape[1]):
        leaves = work[i, p] - (work[j, p] if j >= 0 else 0.0)
        after = max(after, seconds[a, p] - leaves, seconds[b, p] + leaves)
        if after >= best:
            return np.inf
        heavier = bytes_of[i, p] - (bytes_of[j, p] if j >= 0 else 0.0)
        if held[a, p] - heavier > most or held[b, p] + heavier > most:
            return np.inf
    return after


@allocating
def _place(
    work: Floats, bytes_of: Floats, tokens: Places, microbatch: Places, room: Places, count: Places, seconds: Floats,
    held: Floats, home: Places, replica: Places, i: int, j: int, pack: int,
) -> None:  # fmt: skip
    """Sample ``i`` goes to ``pack``, and ``j`` (-1: none) where ``i`` was."""
    left = microbatch[i]
    a, b = replica[left], replica[pack]
    for sample, source, target, here, there in ((i, left, pack, a, b), (j, pack, left, b, a)):
        if sample < 0:
            continue
        microbatch[sample], home[sample] = target, there
        room[source] += tokens[sample]
        room[target] -= tokens[sample]
        count[source] -= 1
        count[target] += 1
        for p in range(seconds.shape[1]):
            seconds[here, p] -= work[sample, p]
            seconds[there, p] += work[sample, p]
            held[here, p] -= bytes_of[sample, p]
            held[there, p] += bytes_of[sample, p]
