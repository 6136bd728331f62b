"""One plan for all ranks of a replica: made on one, broadcast while an iteration runs, compared before its own."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import struct
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ..core import Plan
from ..core.plan_set import PlanSet
from ..core.protocols import Exchange, ScatteringExchange
from ..describe.cost import Corrections
from .prefetch import Prefetch
from .recalibration import Measurement, Recalibration
from .request import PlannerStatistics, PlanRequest, Service, differences

_HEAD = struct.Struct(f"<{hashlib.sha256().digest_size}sI")  # a plan's hash, bytes of news


class PlanMismatchError(RuntimeError):
    """Ranks hold different plans for one iteration; running them would hang or mix up tensors."""


@dataclass(frozen=True)
class DeliveredPlan:
    """A plan ready to run. ``request``: its request's number. ``stall_seconds``: how long the trainer waited for it;
    ``at_call``: from asking for it, when the schedule was called, until all ranks had it. ``statistics``: the
    service's, when the plan was sent. ``shared``: what rank 0 sent along; ``news``: what each rank of the replica
    did."""

    request: int
    plan: Plan
    stall_seconds: float
    statistics: PlannerStatistics
    shared: Any = None
    news: tuple[bytes, ...] = ()
    at_call: bool = False


@dataclass(frozen=True)
class CoupledReplicas:
    """Replicas that share experts, ``count`` of them, of which this rank belongs to ``replica``. ``firsts``: the
    exchange among the first ranks of all, on those ranks; None on others."""

    count: int
    replica: int
    firsts: ScatteringExchange | None


@dataclass(frozen=True)
class _Ask:
    """What a replica asks for: a ``request``, with what its rank 0 has ``shared`` with its ranks and what these have
    measured since it asked last (``told``)."""

    request: PlanRequest
    shared: Any
    told: list[bytes]


@dataclass(frozen=True)
class _Answer:
    """What the ranks of a replica are sent: see :class:`DeliveredPlan`. ``digests``: of the plans of all replicas that
    share experts, its own among them, with the ``corrections`` of the costs these were made with."""

    plan: Plan
    statistics: PlannerStatistics
    shared: Any
    digests: tuple[str, ...]
    corrections: Corrections


class PlanDelivery:
    """Delivers the same plan to every rank of a replica.

    The first replica's rank 0 has the planner service: it plans for all replicas that share experts (for its own, where
    none are shared), and learns from what all their ranks measured. The first ranks bring together what their replicas
    ask for and have measured, get their own of the plans that were made together, and tell their replica: no rank takes
    in another replica's plan, and no collective joins all ranks, of which there may be hundreds.
    """

    def __init__(
        self, exchange: Exchange, service: Service | None, recalibrate: bool = False,
        coupled: CoupledReplicas | None = None,
    ):  # fmt: skip
        """``exchange`` is among the ranks of the replica, and the delivery's alone: a thread broadcasts over it at any
        time. ``recalibrate`` (the same on all ranks): plan with costs corrected by measurements. ``coupled``: replicas
        that the service plans together."""
        if (exchange.rank == 0 and (coupled is None or coupled.replica == 0)) != (service is not None):
            raise ValueError("exactly rank 0 of the exchange, of the first of coupled replicas, has a planner service")
        if coupled is not None and (exchange.rank == 0) != (coupled.firsts is not None):
            raise ValueError("exactly rank 0 of each coupled replica is in the exchange among the first ranks")
        self._coupled = coupled or CoupledReplicas(1, 0, _Alone() if exchange.rank == 0 else None)
        self._firsts = self._coupled.firsts
        self._exchange = exchange
        self._service = service
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dip-plan-delivery")
        self._coming: dict[int, tuple[str, Future[bytes], Prefetch | None]] = {}
        self._recalibration = Recalibration() if recalibrate else None
        self._measured: Measurement | None = None
        # On all ranks: with what the last plan taken was made; on the first ranks: what their replica has measured
        # since they asked last; where plans are made, in the thread: plans not learnt from yet.
        self._known = Corrections()
        self._told: list[bytes] = []
        self._made: dict[int, tuple[PlanSet, Corrections]] = {}

    def request(
        self, request: PlanRequest, wait_seconds: float, shared: Any = None, ahead: bool = False, hurries: bool = False
    ) -> None:
        """Begin to plan and to broadcast; every rank calls it with the same requests in the same order (only rank 0's
        loads, and what is ``shared`` there, matter). ``wait_seconds``: how long to wait for a worker's final plan;
        ``ahead``: for its first one, until :meth:`take` is called, from when on that will do if training ``hurries``
        (see :class:`.prefetch.Prefetch`)."""
        waits = Prefetch(hurries) if ahead and self._service is not None else None
        told, self._told = self._told, []
        delivery = self._thread.submit(self._deliver, _Ask(request, shared, told), wait_seconds, waits)
        self._coming[request.request] = request.subject, delivery, waits

    def corrections(self) -> Corrections:
        """Those of the costs that the last plan taken was made with; on all ranks of all replicas."""
        return self._known

    @property
    def plans_here(self) -> bool:
        """Whether this rank's requests are the ones that count."""
        return self._exchange.rank == 0

    def measured(self, measurement: Measurement) -> None:
        """What this rank measured in a training iteration that was taken here; sent along with the next ``take``."""
        if self._recalibration is not None:
            self._measured = measurement

    def share(self, data: bytes) -> list[bytes]:
        """Everyone's bytes, to all of the replica: before the first request, or between a ``take`` and the next
        request."""
        return self._exchange.gather(data)

    def take(self, request: int, news: bytes = b"") -> DeliveredPlan:
        """The plan, once all ranks have shown to hold the same; what each has to tell the others travels with it.
        Raises PlanMismatchError on all ranks alike."""
        start = time.perf_counter()
        for earlier, (_, _, waits) in self._coming.items():
            if waits is not None:  # one thread delivers all: an evaluation waits for what was asked for before it, too
                waits.need()
            if earlier == request:
                break
        subject, delivery, _ = self._coming.pop(request)
        there = delivery.done()  # then whatever passes until it is read, on a busy host, is no wait for the plan
        data = delivery.result()
        stall = 0.0 if there else time.perf_counter() - start
        answer = pickle.loads(data)
        if isinstance(answer, str):
            raise RuntimeError(f"no plan for {subject}: {answer}")
        assert isinstance(answer, _Answer)
        measured = b"" if self._measured is None else self._measured.pack()
        everyone = self._exchange.gather(_HEAD.pack(self._agreed(request, answer), len(news)) + news + measured)
        hashes, lengths = zip(*(_HEAD.unpack_from(data) for data in everyone), strict=True)
        self._check(subject, hashes)
        rest = [data[_HEAD.size :] for data in everyone]
        told = [data[n:] for data, n in zip(rest, lengths, strict=True) if len(data) > n]
        self._measured, self._known = None, answer.corrections
        if self._firsts is not None:
            self._told += told
        heard = tuple(data[:n] for data, n in zip(rest, lengths, strict=True))
        return DeliveredPlan(request, answer.plan, stall, answer.statistics, answer.shared, heard)

    def _agreed(self, request: int, answer: _Answer) -> bytes:
        """Hash of what this rank holds of what all must hold: its plan, and the digests of those made with it."""
        digests = list(answer.digests)
        digests[self._coupled.replica] = answer.plan.digest()
        return hashlib.sha256(" ".join([str(request), *digests]).encode()).digest()

    def _check(self, subject: str, hashes: Sequence[bytes]) -> None:
        """Raises PlanMismatchError, on all ranks alike, where not all ``hashes`` of the replica's ranks, and those of
        coupled replicas, are the same."""
        replicas = [hashes]
        if self._coupled.count > 1:
            firsts, size = self._firsts, len(hashes[0])
            data = None if firsts is None else b"".join(firsts.gather(b"".join(hashes)))
            data = self._exchange.broadcast(data)
            flat = [data[i : i + size] for i in range(0, len(data), size)]
            replicas = [flat[i : i + len(hashes)] for i in range(0, len(flat), len(hashes))]
        for replica, theirs in enumerate(replicas):
            odd = [rank for rank, h in enumerate(theirs) if h != replicas[0][0]]
            if odd:
                where = "the replica" if len(replicas) == 1 else f"replica {replica} of those that share experts"
                raise PlanMismatchError(
                    f"{subject}: ranks {odd} of {where} hold another plan than rank 0; stopping all before "
                    "the first action. Restart from the last checkpoint; if it comes again, check these hosts' memory"
                )

    def close(self) -> None:
        """End the thread and the planner's workers."""
        for _, _, waits in self._coming.values():
            if waits is not None:
                waits.need()
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._service is not None:
            self._service.close()

    def _deliver(self, ask: _Ask, wait_seconds: float, ahead: Prefetch | None) -> bytes:
        """Bring together what the replicas ask, plan for all, and tell all of them; in the thread, so that no replica
        waits for another in the middle of an iteration."""
        if self._firsts is None:
            return self._exchange.broadcast(None)
        try:
            asks = [pickle.loads(data) for data in self._firsts.gather(pickle.dumps(ask))]
            answers = None if self._service is None else self._answers(self._service, asks, wait_seconds, ahead)
            data = self._firsts.scatter(answers)
        except Exception as error:  # the other ranks of the replica must learn of it
            data = pickle.dumps(f"{type(error).__name__}: {error}")
        return self._exchange.broadcast(data)

    def _answers(
        self, service: Service, asks: Sequence[_Ask], wait_seconds: float, ahead: Prefetch | None
    ) -> list[bytes]:
        """An answer for each replica, pickled: its own of the plans that are made together."""
        asked = [ask.request for ask in asks]
        number = asked[0].request
        try:
            fault = differences(asked)
            if fault:
                return [pickle.dumps(fault)] * len(asks)
            used = self._learn([ask.told for ask in asks])
            # A worker that begins late searches for less, and leaves a fifth of the wait to what follows the search.
            deadline = time.monotonic() + 0.8 * wait_seconds
            replicas = tuple(request.loads for request in asked)
            service.submit(replace(asked[0], replicas=replicas, deadline=deadline, corrections=used))
            with ahead or contextlib.nullcontext():
                plans = service.take(number, wait_seconds, ahead)
            made_with = service.corrections(number)
            used = used if made_with is None else made_with
            if self._recalibration is not None and not asked[0].forward_only:
                self._made = {**dict(list(self._made.items())[-_UNMEASURED:]), number: (plans, used)}
            digests, statistics = tuple(plan.digest() for plan in plans.plans), replace(service.statistics)
            return [
                pickle.dumps(_Answer(plan, statistics, ask.shared, digests, used))
                for plan, ask in zip(plans.plans, asks, strict=True)
            ]
        except Exception as error:  # all ranks must learn of it, or they would wait
            return [pickle.dumps(f"{type(error).__name__}: {error}")] * len(asks)

    def _learn(self, told: Sequence[Sequence[bytes]]) -> Corrections:
        """From what the ranks of each replica have measured of one iteration; what is known then."""
        if self._recalibration is None:
            return Corrections()
        replicas = [[Measurement.unpack(data) for data in theirs] for theirs in told]
        for number in sorted({m.request for theirs in replicas for m in theirs}):
            made = self._made.pop(number, None)
            if made is not None:
                of = [[m for m in theirs if m.request == number] for theirs in replicas]
                self._recalibration.observe(*made, of)
            self._made = {later: made for later, made in self._made.items() if later > number}
        return self._recalibration.corrections()


_UNMEASURED = 3  # sets of plans that are kept for what is measured of them, beside the newest one


class _Alone:
    """The exchange among the first ranks of all replicas where there is one."""

    rank = 0

    def broadcast(self, data: bytes | None) -> bytes:
        assert data is not None
        return data

    def gather(self, data: bytes) -> list[bytes]:
        return [data]

    def scatter(self, parts: Sequence[bytes] | None) -> bytes:
        assert parts is not None
        return parts[0]
