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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ..core.graph import Floats
from ..describe.cost import Corrections
from ..describe.model import Training
from ..describe.workload import Microbatch
from ..planner.balance import Assignment, ExchangeReport, Mode, Work, assign, microbatch_work
from ..planner.delivery import PlanDelivery
from ..planner.live import ModelGraphs
from ..runtime.groups import local_group
from ..runtime.parcels import pack, unpack
from .exchange import GlooExchange

LEAST_GAIN = 0.005
"""Share of the job's time that an exchange has to gain, or nobody moves anything."""


Price = Callable[[Any], tuple[Floats, Floats]]


class ReplicaExchangeError(RuntimeError):
    """An exchange that did not come to its end; no rank may train on what it holds."""


def price_of(graphs: ModelGraphs, corrections: Callable[[], Corrections]) -> Price:
    """Prices a replica's microbatches, given with what trains, as its plans would be priced now."""

    def price(given: tuple[tuple[Microbatch, ...], Training | None]) -> tuple[Floats, Floats]:
        loads, training = given
        return microbatch_work(corrections().apply(graphs.build(loads, False, training)))

    return price


class ReplicaExchange:
    """Collective over all ranks of all replicas; used by one thread at a time, over process groups of its own."""

    def __init__(
        self,
        peers: Sequence[int],
        replica: Sequence[int],
        price: Price | None,
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

    def exchange(
        self, loads: Any, microbatches: Sequence[Any], complete: bool = True
    ) -> tuple[list[Any], ExchangeReport]:
        """This replica's microbatches afterwards. ``loads`` is what ``price`` takes, None where there is none;
        ``complete``: False where the data of this replica has ended, and it takes part so that no other one waits.

        Raises ReplicaExchangeError where a peer doesn't answer in time or answers something else, ParcelError where a
        microbatch can't travel: then the run has to stop.
        """
        began = time.perf_counter()
        try:
            assignment, before, reason = self._assignment(loads, complete)
            if assignment is None:
                return list(microbatches), ExchangeReport(before, before, 0, 0, time.perf_counter() - began, reason)
            result, sent = self._move(assignment, microbatches)
        except (RuntimeError, dist.DistBackendError) as error:
            raise ReplicaExchangeError(
                f"the exchange of microbatches between replicas (ranks {self._peers}) broke off: {error}; "
                "nothing was trained on it. Restart from the last checkpoint, or with --dip-balance off"
            ) from error
        after = float(assignment.after.max() / assignment.after.mean())
        moved = int(assignment.moved.sum())
        return result, ExchangeReport(before, after, moved, sent, time.perf_counter() - began)

    def _assignment(self, loads: Any, complete: bool) -> tuple[Assignment | None, float, str]:
        """What to do, or None and why, and the slowest replica over the mean: the same on all ranks of all replicas."""
        told = None
        if self._price is not None:
            mine = self._price(loads) if complete else None
            everyone = [pickle.loads(data) for data in self._prices.gather(pickle.dumps(mine))]
            told = pickle.dumps(self._agreed(everyone))
        answer: tuple[Assignment | None, float, str] = pickle.loads(self._replica.broadcast(told))
        return answer

    def _agreed(self, everyone: Sequence[tuple[Floats, Floats] | None]) -> tuple[Assignment | None, float, str]:
        """From the prices of all replicas; the first ranks alone."""
        prices = [price for price in everyone if price is not None]
        if len(prices) < len(everyone):
            return None, 1.0, "the data of a replica has ended"
        counts = [len(seconds) for seconds, _ in prices]
        if len(set(counts)) > 1:
            return None, 1.0, "replicas have different numbers of microbatches"
        work = Work(
            np.concatenate([seconds for seconds, _ in prices]), np.concatenate([held for _, held in prices]),
            np.repeat(np.arange(len(prices)), counts), len(prices),
        )  # fmt: skip
        found = assign(work, self._mode)
        before = float(found.before.max() / found.before.mean()) if found.before.max() > 0 else 1.0
        digests = self._prices.gather(found.digest().encode())
        if len(set(digests)) > 1:
            return None, before, "replicas came to different assignments"
        if found.before.max() - found.after.max() < self._least_gain * found.before.max():
            return None, before, "there is too little to gain"
        return found, before, ""

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


class ExchangesAhead:
    """Exchanges in a thread, one at a time, while an iteration trains."""

    def __init__(self, exchange: ReplicaExchange):
        self._exchange = exchange
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dip-exchange")
        self._running: Future[ExchangeReport] | None = None

    def begin(
        self, loads: Any, microbatches: Sequence[Any], complete: bool, then: Callable[[list[Any]], object]
    ) -> None:
        """Begin an exchange; ``then`` takes what this replica has afterwards, if it is complete, in the thread."""

        def run() -> ExchangeReport:
            found, report = self._exchange.exchange(loads, microbatches, complete)
            if complete:
                then(found)
            return report

        self._running = self._thread.submit(run)

    def settle(self) -> ExchangeReport | None:
        """Wait for the exchange that was begun, if any: its report, with how long this took. Raises what it raised."""
        if self._running is None:
            return None
        began, running, self._running = time.perf_counter(), self._running, None
        report = running.result()
        return replace(report, stall_seconds=time.perf_counter() - began)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def begin_exchanges(
    graphs: ModelGraphs | None, delivery: PlanDelivery, timeout_seconds: float, device: torch.device
) -> ExchangesAhead:
    """Between the data-parallel replicas of Megatron's groups; all ranks call it together. ``graphs`` price the
    microbatches where plans are made."""
    exchange = ReplicaExchange(
        dist.get_process_group_ranks(parallel_state.get_data_parallel_group()),
        sorted(dist.get_process_group_ranks(parallel_state.get_model_parallel_group())),
        price_of(graphs, delivery.corrections) if delivery.plans_here and graphs is not None else None,
        timeout_seconds=timeout_seconds, device=device,
    )  # fmt: skip
    return ExchangesAhead(exchange)
