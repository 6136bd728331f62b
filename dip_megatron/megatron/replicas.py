"""Microbatches change replicas before they are planned, so that all replicas end together.

On each rank there is one exchange with its *peers*: the ranks at the same tensor- and pipeline-parallel place of all
data-parallel replicas. The first rank of every replica prices its microbatches; the prices are gathered, everyone's
assignment is worked out alike (:mod:`dip_megatron.planner.balance`), compared, and told to the other ranks of the
replica; then each rank sends what leaves to its peers, and takes what comes into the places that have become free.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..core.graph import Floats
from ..planner.balance import Assignment, Mode, Work, assign
from ..runtime.groups import local_group
from ..runtime.parcels import pack, unpack
from .exchange import GlooExchange

LEAST_GAIN = 0.005
"""Share of the job's time that an exchange has to gain, or nobody moves anything."""


class ReplicaExchangeError(RuntimeError):
    """An exchange that did not come to its end; no rank may train on what it holds."""


@dataclass(frozen=True)
class ExchangeReport:
    """One exchange. ``before`` and ``after``: the slowest replica's predicted seconds over the mean. ``moved``:
    microbatches that changed replicas, in all; ``sent_bytes``: by this rank; ``seconds``: the exchange took here,
    waiting included. ``reason``: why nobody moved anything, or empty."""

    before: float
    after: float
    moved: int
    sent_bytes: int
    seconds: float
    reason: str = ""


class ReplicaExchange:
    """Collective over all ranks of all replicas; used by one thread at a time, over process groups of its own."""

    def __init__(
        self,
        peers: Sequence[int],
        replica: Sequence[int],
        price: Callable[[Any], tuple[Floats, Floats]] | None,
        *,
        mode: Mode = "swap",
        least_gain: float = LEAST_GAIN,
        timeout_seconds: float = 600.0,
        device: torch.device | None = None,
    ):
        """``peers``: global ranks of this place in every replica, in the order of replicas; ``replica``: those of this
        rank's replica, the first of which prices. ``price`` gives seconds and bytes ``[microbatches, pipeline ranks]``
        of the loads it is handed; the first rank has one, the others None."""
        self._peers = list(peers)
        self._index = self._peers.index(dist.get_rank())
        self._group = local_group(self._peers, "gloo", timedelta(seconds=timeout_seconds))
        self._prices = GlooExchange(self._peers, timeout_seconds)
        self._replica = GlooExchange(list(replica), timeout_seconds)
        self._price, self._mode, self._least_gain, self._device = price, mode, least_gain, device

    def exchange(self, loads: Any, microbatches: Sequence[Any]) -> tuple[list[Any], ExchangeReport]:
        """This replica's microbatches afterwards. ``loads`` is what ``price`` takes, None where there is none.

        Raises ReplicaExchangeError where a peer doesn't answer in time or answers something else, ParcelError where a
        microbatch can't travel: then the run has to stop.
        """
        began = time.perf_counter()
        try:
            assignment, reason = self._assignment(loads, len(microbatches))
            if reason:
                worth = assignment.before
                even = float(worth.max() / worth.mean()) if worth.mean() > 0 else 1.0
                return list(microbatches), ExchangeReport(even, even, 0, 0, time.perf_counter() - began, reason)
            result, sent = self._move(assignment, microbatches)
        except (RuntimeError, dist.DistBackendError) as error:
            raise ReplicaExchangeError(
                f"the exchange of microbatches between replicas (ranks {self._peers}) broke off: {error}; "
                "nothing was trained on it. Restart from the last checkpoint, or with --dip-balance off"
            ) from error
        return result, ExchangeReport(
            float(assignment.before.max() / assignment.before.mean()),
            float(assignment.after.max() / assignment.after.mean()),
            int(assignment.moved.sum()), sent, time.perf_counter() - began,
        )  # fmt: skip

    def _assignment(self, loads: Any, count: int) -> tuple[Assignment, str]:
        """The same on all ranks of all replicas, with the reason not to follow it, if there is one."""
        told = None
        if self._price is not None:
            seconds, held = self._price(loads)
            everyone = [pickle.loads(data) for data in self._prices.gather(pickle.dumps((seconds, held)))]
            work = Work(
                np.concatenate([s for s, _ in everyone]),
                np.concatenate([h for _, h in everyone]),
                np.repeat(np.arange(len(everyone)), [len(s) for s, _ in everyone]),
                len(everyone),
            )
            found = assign(work, self._mode)
            reason = ""
            if found.before.max() - found.after.max() < self._least_gain * found.before.max():
                reason = "there is too little to gain"
            digests = self._prices.gather(f"{found.digest()} {reason}".encode())
            if len(set(digests)) > 1:
                reason = "replicas came to different assignments"
            told = pickle.dumps((found, reason))
        answer: tuple[Assignment, str] = pickle.loads(self._replica.broadcast(told))
        self._first(answer[0], count)
        return answer

    def _first(self, assignment: Assignment, count: int) -> int:
        """Number of this replica's first microbatch among all; every replica brings equally many."""
        if len(assignment.replica) != count * len(self._peers):
            raise ReplicaExchangeError(
                f"{len(self._peers)} replicas bring {len(assignment.replica)} microbatches, this one {count}: they "
                "must bring equally many"
            )
        return self._index * count

    def _move(self, assignment: Assignment, microbatches: Sequence[Any]) -> tuple[list[Any], int]:
        """Send what leaves and take what comes, one microbatch a peer at a time, so that little memory is needed."""
        count = len(microbatches)
        owner = np.repeat(np.arange(len(self._peers)), count)
        leaving = [
            [int(m) for m in np.flatnonzero((owner == source) & assignment.moved)] for source in range(len(self._peers))
        ]
        coming: dict[int, Any] = {}
        sent = 0
        for step in range(max(len(line) for line in leaving)):
            going = [line[step] if step < len(line) else None for line in leaving]
            mine = going[self._index]
            parcel = b"" if mine is None else pack(microbatches[mine - self._index * count])
            target = None if mine is None else int(assignment.replica[mine])
            expected = {
                source: m for source, m in enumerate(going) if m is not None and assignment.replica[m] == self._index
            }
            coming |= self._swap(parcel, target, expected)
            sent += len(parcel)
        free = iter(sorted(coming))
        result = []
        for m in range(self._index * count, (self._index + 1) * count):
            if not assignment.moved[m]:
                result.append(microbatches[m - self._index * count])
            elif (number := next(free, None)) is not None:
                result.append(coming[number])
        result += [coming[number] for number in free]
        return result, sent

    def _swap(self, parcel: bytes, target: int | None, expected: dict[int, int]) -> dict[int, Any]:
        """One parcel to ``target``, one from each replica of ``expected``; microbatches by number."""
        replicas = len(self._peers)
        sizes = torch.zeros(replicas, dtype=torch.int64)
        if target is not None:
            sizes[target] = len(parcel)
        from_each = torch.zeros(replicas, dtype=torch.int64)
        dist.all_to_all_single(from_each, sizes, group=self._group)
        arrived = torch.empty(int(from_each.sum()), dtype=torch.uint8)
        leaves = torch.empty(0, dtype=torch.uint8)
        if parcel:
            leaves = torch.frombuffer(bytearray(parcel), dtype=torch.uint8)
        dist.all_to_all_single(arrived, leaves, from_each.tolist(), sizes.tolist(), group=self._group)
        found, place = {}, 0
        for source, size in enumerate(from_each.tolist()):
            if (size > 0) != (source in expected):
                raise ReplicaExchangeError(f"rank {self._peers[source]} sent {size} bytes that were not agreed on")
            if size:
                found[expected[source]] = unpack(arrived[place : place + size].numpy().tobytes(), self._device)
            place += size
        return found
