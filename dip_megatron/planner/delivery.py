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
from ..core.joint import JointPlan
from ..core.protocols import Exchange
from ..describe.cost import Corrections
from .ahead import Ahead
from .recalibration import Measurement, Recalibration
from .request import AnyPlan, PlannerStatistics, PlanRequest, Service, differences

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
class CoupledRanks:
    """Where replicas that share experts stand in an exchange among all of them: ``replicas[r]`` are the places of
    replica r's ranks, the first of which has its loads; this rank is of ``replica``."""

    replicas: tuple[tuple[int, ...], ...]
    replica: int

    @property
    def own(self) -> tuple[int, ...]:
        """Places of this rank's replica."""
        return self.replicas[self.replica]


class PlanDelivery:
    """Delivers the same plan to every rank of a replica, and to every replica that shares its experts the plan that was
    made with it. Rank 0 of the exchange owns the planner service, and learns from what all ranks measured."""

    def __init__(
        self, exchange: Exchange, service: Service | None, recalibrate: bool = False,
        coupled: CoupledRanks | None = None,
    ):  # fmt: skip
        """``exchange`` is the delivery's alone: a thread broadcasts over it at any time. ``recalibrate`` (the same
        on all ranks): plan with costs corrected by measurements. ``coupled``: the exchange is among all ranks of
        several replicas, for which the service plans together."""
        if (exchange.rank == 0) != (service is not None):
            raise ValueError("exactly rank 0 of the exchange has a planner service")
        self._coupled = coupled
        self._exchange = exchange
        self._service = service
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dip-plan-delivery")
        self._coming: dict[int, tuple[str, Future[bytes], Ahead | None]] = {}
        self._recalibration = Recalibration() if recalibrate else None
        self._measured: Measurement | None = None
        self._corrections: dict[int, Corrections] = {}
        self._running: tuple[int, AnyPlan, Corrections] | None = None
        self._known = Corrections()  # with which the last plan taken was made; of coupled replicas, on all their ranks

    def request(
        self, request: PlanRequest, wait_seconds: float, shared: Any = None, ahead: bool = False, hurries: bool = False
    ) -> None:
        """Begin to plan and to broadcast; every rank calls it with the same requests in the same order (only rank 0's
        loads, and what is ``shared`` there, matter). ``wait_seconds``: how long to wait for a worker's final plan;
        ``ahead``: for its first one, until :meth:`take` is called, from when on that will do if training ``hurries``
        (see :class:`.ahead.Ahead`)."""
        waits = Ahead(hurries) if ahead and self._service is not None else None
        if self._service is not None and self._recalibration is not None:
            request = replace(request, corrections=self._recalibration.corrections())
            self._corrections[request.request] = request.corrections
        if self._coupled is not None:
            job = self._thread.submit(self._deliver_together, request, wait_seconds, shared, self._coupled, waits)
            self._coming[request.request] = request.subject, job, waits
            return
        if self._service is not None:
            # A worker that begins late searches for less, and leaves a fifth of the wait to what follows the search.
            request = replace(request, deadline=time.monotonic() + 0.8 * wait_seconds)
            self._service.submit(request)
        delivery = self._thread.submit(self._deliver, request.request, wait_seconds, shared, waits)
        self._coming[request.request] = request.subject, delivery, waits

    def corrections(self) -> Corrections:
        """Those that a plan asked for now would be made with; on rank 0. Of coupled replicas, on all of their ranks:
        those of the last plan taken."""
        if self._coupled is not None:
            return self._known
        return Corrections() if self._recalibration is None else self._recalibration.corrections()

    @property
    def plans_here(self) -> bool:
        """Whether this rank's requests are the ones that count."""
        if self._coupled is not None:
            return self._exchange.rank == self._coupled.own[0]
        return self._service is not None

    def measured(self, measurement: Measurement) -> None:
        """What this rank measured in a training iteration that was taken here; sent along with the next ``take``."""
        if self._recalibration is not None:
            self._measured = measurement

    def share(self, data: bytes) -> list[bytes]:
        """Everyone's bytes, to all of the replica: before the first request, or between a ``take`` and the next
        request."""
        return self._of_replica(self._exchange.gather(data))

    def _of_replica(self, everyone: Sequence[bytes]) -> list[bytes]:
        places = range(len(everyone)) if self._coupled is None else self._coupled.own
        return [everyone[place] for place in places]

    def take(self, request: int, news: bytes = b"") -> DeliveredPlan:
        """The plan, once all ranks have shown to hold the same; what each has to tell the others travels with it.
        Raises PlanMismatchError on all ranks alike."""
        start = time.perf_counter()
        subject, delivery, waits = self._coming.pop(request)
        if waits is not None:
            waits.need()
        there = delivery.done()  # then whatever passes until it is read, on a busy host, is no wait for the plan
        data = delivery.result()
        stall = 0.0 if there else time.perf_counter() - start
        answer = pickle.loads(data)
        if isinstance(answer, str):
            raise RuntimeError(f"no plan for {subject}: {answer}")
        answered: AnyPlan = answer[0]
        digest = hashlib.sha256(f"{request} {answered.digest()}".encode()).digest()
        measured = b"" if self._measured is None else self._measured.pack()
        everyone = self._exchange.gather(_HEAD.pack(digest, len(news)) + news + measured)
        hashes, lengths = zip(*(_HEAD.unpack_from(data) for data in everyone), strict=True)
        rest = [data[_HEAD.size :] for data in everyone]
        odd = [rank for rank, h in enumerate(hashes) if h != hashes[0]]
        if odd:
            who = "the replica" if self._coupled is None else "the replicas that share experts"
            raise PlanMismatchError(
                f"{subject}: ranks {odd} of {who} hold another plan than rank 0; stopping all before "
                "the first action. Restart from the last checkpoint; if it comes again, check these hosts' memory"
            )
        self._learn([Measurement.unpack(d[n:]) if len(d) > n else None for d, n in zip(rest, lengths, strict=True)])
        self._measured = None
        told = tuple(self._of_replica([data[:n] for data, n in zip(rest, lengths, strict=True)]))
        self._running = (request, answered, self._corrections.pop(request, Corrections()))
        if isinstance(answered, JointPlan):
            mine = 0 if self._coupled is None else self._coupled.replica
            self._known = answer[3]
            return DeliveredPlan(request, answered.plans[mine], stall, answer[1], answer[2][mine], told)
        return DeliveredPlan(request, answered, stall, answer[1], answer[2], told)

    def _learn(self, everyone: Sequence[Measurement | None]) -> None:
        """From what each rank of the exchange measured, if it did."""
        if self._recalibration is None or self._service is None or self._running is None:
            return
        request, plan, used = self._running
        of = [[m] if m is not None and m.request == request else [] for m in everyone]
        if isinstance(plan, JointPlan):
            assert self._coupled is not None
            replicas = [[m for place in places for m in of[place]] for places in self._coupled.replicas]
            self._recalibration.observe_together(plan, used, replicas)
        elif any(of):
            self._recalibration.observe(plan, used, [m for measured in of for m in measured])

    def close(self) -> None:
        """End the thread and the planner's workers."""
        for _, _, waits in self._coming.values():
            if waits is not None:
                waits.need()
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._service is not None:
            self._service.close()

    def _deliver(self, request: int, wait_seconds: float, shared: Any, ahead: Ahead | None) -> bytes:
        if self._service is None:
            return self._exchange.broadcast(None)
        answer: Any
        try:
            with ahead or contextlib.nullcontext():
                plan = self._service.take(request, wait_seconds, ahead)
            self._note_corrections(request)
            answer = plan, replace(self._service.statistics), shared
        except Exception as error:  # all ranks must learn of it, or they would wait for the broadcast
            answer = f"{type(error).__name__}: {error}"
        return self._exchange.broadcast(pickle.dumps(answer))

    def _note_corrections(self, request: int) -> Corrections:
        """Those that the plan just taken from the service was made with: the request's, or an earlier one's."""
        assert self._service is not None
        made_with = self._service.corrections(request)
        if made_with is not None and request in self._corrections:
            self._corrections[request] = made_with
        return self._corrections.get(request, Corrections())

    def _deliver_together(
        self, request: PlanRequest, wait_seconds: float, shared: Any, coupled: CoupledRanks, ahead: Ahead | None
    ) -> bytes:
        """In the thread, so that no replica waits for another in the middle of an iteration: bring together what the
        replicas ask, plan for all, and tell all of them."""
        asks = pickle.dumps((replace(request, corrections=Corrections()), shared)) if self.plans_here else b""
        everyone = self._exchange.gather(asks)
        if self._service is None:
            return self._exchange.broadcast(None)
        answer: Any
        try:
            told = [pickle.loads(everyone[places[0]]) for places in coupled.replicas]
            asked = [theirs for theirs, _ in told]
            answer = differences(asked)
            if not answer:
                deadline = time.monotonic() + 0.8 * wait_seconds
                self._service.submit(replace(request, deadline=deadline, replicas=tuple(a.loads for a in asked)))
                with ahead or contextlib.nullcontext():
                    plan = self._service.take(request.request, wait_seconds, ahead)
                made_with = self._note_corrections(request.request)
                answer = plan, replace(self._service.statistics), [theirs for _, theirs in told], made_with
        except Exception as error:  # all ranks must learn of it, or they would wait for the broadcast
            answer = f"{type(error).__name__}: {error}"
        return self._exchange.broadcast(pickle.dumps(answer))
