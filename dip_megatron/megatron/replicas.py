"""Microbatches change replicas before they are planned, so that all replicas end together.

On each rank there is one exchange with its *peers*: the ranks at the same tensor- and pipeline-parallel place of all
data-parallel replicas. The first rank of every replica quotes its microbatches; from the quotes everyone makes the same
proposal (:mod:`dip_megatron.planner.exchange_agreement`), which is compared and told to the other ranks of the replica;
then each rank sends what leaves to its peers, and takes what comes into the places that have become free.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
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

from ..core.experts import ExpertLayers
from ..core.graph import Floats
from ..describe.cost import Corrections
from ..describe.files import ConfigurationError
from ..describe.model import Training
from ..describe.workload import Microbatch
from ..planner.balance import Mode, meeting_work, microbatch_work
from ..planner.delivery import CoupledReplicas, PlanDelivery
from ..planner.exchange_agreement import (
    TOO_DEAR,
    TOO_LATE,
    Answer,
    ExchangeReport,
    Move,
    Proposal,
    Quote,
    SampleMoves,
    propose,
    settle,
)
from ..planner.model_graphs import ModelGraphs
from ..planner.warm import warm_up_exchanges
from ..runtime.groups import local_group
from ..runtime.serialization import SerializationError, pack, serialized_bytes, tensors_of, unpack
from .exchange import GlooExchange
from .ranks import replica_ranks
from .samples import PackingError, Samples

FADING = 0.9
LARGEST_BYTES = 1 << 30
"""Microbatches of more bytes stay where they are: while one travels, both ends hold it twice."""

AT_CALL = (
    "balance: this loop's microbatches aren't read ahead; replicas exchange them when the schedule is called, while "
    "training waits, and only where that gains more than it takes"
)
NOT_FREE = (
    "balance free: replicas would train on different numbers of microbatches, and this loop averages over "
    "microbatches, not over tokens; use --calculate-per-token-loss (Bridge: model.calculate_per_token_loss, other "
    "loops: build_model(weights_by_tokens=True)), or balance swap"
)

Price = Callable[[Any], tuple[Floats, ...]]
"""From what a replica is about to train to seconds and bytes ``[microbatches, pipeline ranks]`` and, where it shares
experts, to the seconds in which it waits for others."""


class ReplicaExchangeError(RuntimeError):
    """An exchange that did not come to its end; no rank may train on what it holds."""


def price_of(
    graphs: ModelGraphs, corrections: Callable[[], Corrections], experts: ExpertLayers | None = None
) -> Price:  # fmt: skip
    """Prices a replica's microbatches, given with what trains, as its plans would be priced now; ``experts`` are those
    that it shares."""

    def price(given: tuple[tuple[Microbatch, ...], Training | None]) -> tuple[Floats, ...]:
        loads, training = given
        graph = corrections().apply(graphs.build(loads, False, training))
        found = microbatch_work(graph)
        return found if experts is None else (*found, meeting_work(graph, experts.meets(graph)))

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
        group: int = 1,
        largest_bytes: float = LARGEST_BYTES,
        timeout_seconds: float = 600.0,
        device: torch.device | None = None,
        samples: Samples | None = None,
    ):
        """``peers``: global ranks of this place in every replica, in the order of replicas; ``replica``: those of this
        rank's replica, the first of which prices: it has a ``price``, which gives seconds and bytes ``[microbatches,
        pipeline ranks]`` of the loads it is handed and, with experts, the seconds that meet others; the rest have None.
        ``group`` replicas after one another share experts. With ``samples`` these move, too."""
        self._peers = list(peers)
        self._index = self._peers.index(dist.get_rank())
        self._timeout = timedelta(seconds=timeout_seconds)
        self._group = local_group(self._peers, "gloo", self._timeout)
        self._quotes = GlooExchange(self._peers, timeout_seconds)
        self._replica = GlooExchange(list(replica), timeout_seconds)
        self._price, self._mode, self._group_size, self._largest = price, mode, group, largest_bytes
        self._device, self._samples = device, samples
        accelerated = device is not None and device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=-1) if accelerated else None  # see LayerContext.offload
        self._slowness = 1.0
        self._declined = 0

    def begin_thread(self) -> None:
        """Call it in a thread that is going to exchange: threads begin on the first device."""
        if self._stream is not None:
            torch.cuda.set_device(self._device)

    def may_begin(self) -> None:
        """Call it where the microbatches have been read, before the exchange, which may be in another thread."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def exchange(
        self, loads: Any, microbatches: Sequence[Any], complete: bool = True, left: float = 0.0
    ) -> tuple[list[Any], ExchangeReport]:
        """This replica's microbatches afterwards. ``loads`` is what ``price`` takes, None where there is none;
        ``complete``: False where the data of this replica has ended, and it takes part so that no other one waits;
        ``left``: seconds until the iteration that runs meanwhile is expected to end.

        Raises ReplicaExchangeError where a peer doesn't answer in time or answers something else, SerializationError
        where a microbatch can't travel, PackingError where the loop packs samples otherwise than it
        says: then the run has to stop.
        """
        began = time.perf_counter()
        try:
            proposal = self._agreed(loads, microbatches, complete, began + left if left > 0 else None)
            result, sent = self._move(proposal, microbatches)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise ReplicaExchangeError(
                f"the exchange of microbatches between replicas (ranks {self._peers}) broke off: {error}; "
                "nothing was trained on it. Restart from the last checkpoint, or with --dip-balance off"
            ) from error
        moved = 0 if proposal.assignment is None else int(proposal.assignment.moved.sum())
        self._declined += proposal.assignment is None
        if proposal.reason in (TOO_DEAR, TOO_LATE):
            # What isn't done can't be measured: a link that was slow once must not end all exchanges.
            self._slowness **= FADING
        samples = 0 if proposal.samples is None else int(proposal.samples.moved.sum())
        report = ExchangeReport(
            proposal.before, proposal.after, moved, sent, time.perf_counter() - began, proposal.reason,
            declined=self._declined, samples=samples,
        )  # fmt: skip
        return result, report

    def _agreed(self, loads: Any, microbatches: Sequence[Any], complete: bool, until: float | None) -> Proposal:
        """What to do, the same on all ranks of all replicas. ``until``: when the running iteration ends."""
        told = None
        if self._price is not None:
            mine: Quote | str | None = self._quote(self._price, loads, microbatches) if complete else None
            everyone = [pickle.loads(data) for data in self._quotes.gather(pickle.dumps(mine))]
            faults = [quote for quote in everyone if isinstance(quote, str)]
            told = pickle.dumps(faults[0] if faults else self._settled(everyone, until))
        answer: Proposal | str = pickle.loads(self._replica.broadcast(told))
        if isinstance(answer, str):
            raise SerializationError(answer)  # or a PackingError's message: either way the data can't be exchanged
        return answer

    def _quote(self, price: Price, loads: Any, microbatches: Sequence[Any]) -> Quote | str:
        """What can't travel is told to all, or they would wait for it."""
        try:
            sizes = np.array([serialized_bytes(m) for m in microbatches], dtype=np.int64)
            with self._on_stream():  # it looks at numbers of samples: not behind all that the device was given to train
                samples = None if self._samples is None else self._samples.quote(price, microbatches, loads[1])
        except (SerializationError, PackingError) as error:
            return str(error)
        seconds, held, *meeting = price(loads)
        return Quote(seconds, held, sizes, self._slowness, meeting[0] if meeting else None, samples)

    def _settled(self, everyone: Sequence[Quote | None], until: float | None) -> Proposal:
        """From the quotes of all replicas; the first ranks alone."""
        proposal = propose(everyone, self._mode, self._largest, self._group_size)
        left = 0.0 if until is None else until - time.perf_counter()
        answer = Answer(proposal.digest(), max(left, 0.0), until is not None and left <= 0.0)
        return settle(proposal, [Answer.unpack(data) for data in self._quotes.gather(answer.pack())])

    def _move(self, proposal: Proposal, microbatches: Sequence[Any]) -> tuple[list[Any], int]:
        """Send what leaves and take what comes, at most one each a round, so that little memory is needed."""
        line = proposal.line(self._index)
        if line is None:
            return list(microbatches), 0
        began = time.perf_counter()
        known = dict(enumerate(microbatches, sum(proposal.counts[: self._index])))
        sent = self._rounds(proposal.rounds(), known)
        if proposal.samples is not None:
            sent += self._repack(proposal.samples, known)
        took = (time.perf_counter() - began) / proposal.nominal_seconds
        self._slowness = (self._slowness * min(max(took, 0.01), 1000.0)) ** 0.5
        return [known[number] for number in line], sent

    def _rounds(self, rounds: Sequence[Sequence[Move]], known: dict[int, Any]) -> int:
        """What ``known`` holds by its number, after these rounds; the bytes sent."""
        sent = 0
        for moves in rounds:
            out = next((move for move in moves if move.source == self._index), None)
            into = next((move for move in moves if move.target == self._index), None)
            arrived, size = self._round(out, None if out is None else known.pop(out.number), into)
            sent += size
            if into is not None:
                known[into.number] = arrived
        return sent

    def _repack(self, moves: SampleMoves, known: dict[int, Any]) -> int:
        """Take microbatches of ``known`` apart, exchange their samples and pack them anew; the bytes sent."""
        assert self._samples is not None  # or it would not have been proposed
        loose: dict[int, Any] = {}
        with self._on_stream():
            for number, samples in moves.split(self._index).items():
                loose |= zip(samples, self._samples.split(known[number], len(samples)), strict=True)
            sent = self._rounds(moves.rounds(), loose)
            for number, samples in moves.packed(self._index).items():
                known[number] = self._samples.pack([loose[sample] for sample in samples])
                for tensor in tensors_of(known[number]) if self._stream is not None else ():
                    if tensor.is_cuda:  # it will be used, and freed, by what runs on the device's usual stream
                        tensor.record_stream(torch.cuda.default_stream(tensor.device))
        if self._stream is not None:
            self._stream.synchronize()
        return sent

    def _on_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _round(self, out: Move | None, microbatch: Any, into: Move | None) -> tuple[Any, int]:
        """Send one microbatch and receive one, either of which may be none; what came, and the bytes sent."""
        works, parcel = [], None
        with self._on_stream():
            if out is not None:
                parcel = pack(microbatch, pinned=self._stream is not None)
                if self._stream is not None:
                    self._stream.synchronize()
                head = torch.tensor([out.number, parcel.numel()])
                works = [dist.isend(part, self._peers[out.target], group=self._group) for part in (head, parcel)]
            found = None if into is None else unpack(self._receive(into), self._device)
            for work in works:
                work.wait(self._timeout)
            if self._stream is not None:
                self._stream.synchronize()
        return found, 0 if parcel is None else parcel.numel()

    def _receive(self, move: Move) -> torch.Tensor:
        source = self._peers[move.source]
        head = torch.empty(2, dtype=torch.int64)
        dist.recv(head, source, group=self._group)
        number, size = head.tolist()
        if number != move.number or size < 8:
            raise ReplicaExchangeError(
                f"rank {source} sent microbatch {number} ({size} bytes), agreed was {move.number}"
            )
        parcel = torch.empty(size, dtype=torch.uint8, pin_memory=self._stream is not None)
        dist.recv(parcel, source, group=self._group)
        return parcel


class ExchangesAhead:
    """Exchanges in a thread, one at a time, while an iteration trains; or, ``at_call``, before one does."""

    def __init__(self, exchange: ReplicaExchange, at_call: bool = False):
        self._exchange = exchange
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dip-exchange", initializer=exchange.begin_thread)
        self._running: Future[ExchangeReport] | None = None
        self.at_call = at_call

    def begin(
        self, loads: Any, microbatches: Sequence[Any], complete: bool, left: float, then: Callable[[list[Any]], object]
    ) -> None:
        """Begin an exchange; ``then`` takes what this replica has afterwards, if it is complete, in the thread. See
        :meth:`ReplicaExchange.exchange`."""

        def run() -> ExchangeReport:
            found, report = self._exchange.exchange(loads, microbatches, complete, left)
            if complete:
                then(found)
            return report

        self._exchange.may_begin()
        self._running = self._thread.submit(run)

    def settle(self) -> ExchangeReport | None:
        """Wait for the exchange that was begun, if any: its report, with how long this took. Raises what it raised."""
        if self._running is None:
            return None
        began, running, self._running = time.perf_counter(), self._running, None
        report = running.result()
        return replace(report, stall_seconds=time.perf_counter() - began)

    def now(self, loads: Any, microbatches: Sequence[Any], complete: bool) -> tuple[list[Any], ExchangeReport]:
        """Exchange here and now, while training waits."""
        self._exchange.may_begin()
        found, report = self._exchange.exchange(loads, microbatches, complete)
        return found, replace(report, stall_seconds=report.seconds)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def begin_exchanges(
    graphs: ModelGraphs | None, delivery: PlanDelivery, timeout_seconds: float, device: torch.device, mode: Mode,
    at_call: bool, coupled: CoupledReplicas | None = None, experts: ExpertLayers | None = None,
    samples: Samples | None = None,
) -> ExchangesAhead:  # fmt: skip
    """Between the data-parallel replicas of Megatron's groups; all ranks call it together. ``graphs`` price the
    microbatches where plans are made; with ``samples`` these move, too. ``coupled`` replicas share ``experts``. Raises
    ConfigurationError if those don't follow one another."""
    group = 1 if coupled is None else coupled.count
    if coupled is not None and parallel_state.get_data_parallel_rank() % group != coupled.replica:
        raise ConfigurationError(
            f"balance {mode}: the replicas that share experts aren't {group} data-parallel ranks after one another; "
            "leave it out"
        )
    exchange = ReplicaExchange(
        dist.get_process_group_ranks(parallel_state.get_data_parallel_group()),
        replica_ranks(),
        price_of(graphs, delivery.corrections, experts) if delivery.plans_here and graphs is not None else None,
        mode=mode, group=group, timeout_seconds=timeout_seconds, device=device, samples=samples,
    )  # fmt: skip
    # Else the first exchange would wait for them; after an installation they are compiled first.
    threading.Thread(
        target=warm_up_exchanges, args=(samples is not None,), name="dip-warm-up-exchanges", daemon=True
    ).start()
    return ExchangesAhead(exchange, at_call)
