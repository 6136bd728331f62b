"""Planner workers: processes that plan iteration t+1 while t trains.

The trainer never waits for more than it allows: a worker first hands over a quick plan, then its best; a dead, hanging
or babbling worker is replaced with a warning, and the trainer plans by itself meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait

from ..core.plan_set import PlanSet
from ..core.verify import PlanError, verify
from ..describe.cost import Corrections
from .plan_cache import CachedPlan, PlanCache
from .prefetch import Prefetch
from .request import READY, PlanMaker, PlannerStatistics, PlanRequest
from .warm import warm_up_plans

logger = logging.getLogger(__name__)

AT_CALL_SECONDS = 0.025
"""From asking for a plan to the end of its search, for an iteration that is planned when the schedule is called: with
all else, on all ranks, within 50 milliseconds."""
IMPROVE_SECONDS = 1.0
"""Of search for batches that come again, while others train."""


@dataclass
class _Asked:
    request: PlanRequest
    at: float


@dataclass
class _Arrived:
    plans: PlanSet
    final: bool
    at: float
    core_seconds: float


@dataclass
class _Worker:
    """``busy_with``: the requests it was given and has not answered, oldest first. ``faults``: how many in a row had to
    be replaced without having answered any; ``rests_until``: when the next one is started, if none is there."""

    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False
    busy_with: deque[int] = field(default_factory=deque)
    busy_since: float = 0.0
    faults: int = 0
    rests_until: float | None = None


class PlannerService:
    """Plans requests in worker processes.

    A request goes to the worker with the least to do. ``take`` returns the best plan that has arrived, verified; or a
    quick one made in this process. With ``improve_seconds`` batches are planned at the call: searched for in this
    process, where nothing has to travel. A batch that holds what an earlier one held then gets that one's plan at once,
    and workers search longer for such batches meanwhile.
    """

    def __init__(
        self, maker: PlanMaker, workers: int = 1, hang_seconds: float = 60.0, silent_seconds: int = 5,
        improve_seconds: float = 0.0, last: bool = False,
    ):  # fmt: skip
        """``workers`` 0 plans in this process only. A worker that is ``hang_seconds`` late, or silent for
        ``silent_seconds`` in the middle of a message, is killed and replaced. ``improve_seconds``: the search for a
        better plan of a batch that comes again; 0: every batch is planned anew. ``last``: workers have the lowest
        priority from the first moment on, not only once they have a plan; for hosts whose cores compute."""
        self.statistics = PlannerStatistics()
        self._maker = maker
        self._hang_seconds = hang_seconds
        self._silent_seconds = silent_seconds
        self._last = last
        self._workers = [self._start() for _ in range(workers)]
        self._improve_seconds = improve_seconds
        self._known = PlanCache()
        self._corrections: dict[int, Corrections] = {}
        self._improving: dict[int, PlanRequest] = {}
        self._asked: dict[int, _Asked] = {}
        self._arrived: dict[int, _Arrived] = {}
        self._rings: dict[int, socket.socket] = {}
        # The thread that warms up, and whoever asks whether a worker is ready, look after workers while another waits.
        self._lock = threading.RLock()
        self._closed = self._busy = False
        self._searches_here = False
        threading.Thread(target=self._warm_up, name="dip-warm-up", daemon=True).start()

    def _warm_up(self) -> None:
        """Load, while the model is built, what this process plans with. What a search needs is loaded when a worker has
        it: after an installation it is compiled first, once, which takes the better part of a minute of a core, and
        another one where replicas share experts."""
        warm_up_plans()
        if self._improve_seconds <= 0:
            return
        while self._workers and not any(worker.ready for worker in self._workers):
            time.sleep(0.1)
            with self._lock:
                self._collect()
        if not self._closed:
            self._maker.warm_up()
            self._searches_here = True

    def submit(self, request: PlanRequest) -> None:
        """Begin planning; returns at once. May be called while another thread is in :meth:`take`."""
        with self._lock:
            self._submit(request)

    def _submit(self, request: PlanRequest) -> None:
        self._collect()
        self._asked[request.request] = _Asked(request, time.monotonic())
        if request.budget_seconds <= 0 or self._improve_seconds > 0:
            return  # needed now: made in this process when it is taken, or known
        busy = not self._send(request, _QUEUE) and any(worker.ready for worker in self._workers)
        if busy and not self._busy:
            logger.info("all planner workers are busy; from %s on the trainer plans by itself", request.subject)
        self._busy = busy

    def _send(self, request: PlanRequest, most: int) -> bool:
        """Give it to the worker with the least to do, if one has less than ``most`` requests."""
        free = [w for w in self._workers if w.ready and len(w.busy_with) < most]
        for worker in sorted(free, key=lambda w: len(w.busy_with)):
            try:
                worker.connection.send_bytes(pickle.dumps(request))
            except OSError:
                self._replace(worker, "has died")
                continue
            if not worker.busy_with:
                worker.busy_since = time.monotonic()
            worker.busy_with.append(request.request)
            return True
        return False

    def take(self, request: int, wait_seconds: float, ahead: Prefetch | None = None) -> PlanSet:
        """The best plans for a submitted request, waiting at most ``wait_seconds`` for a worker's final ones; for first
        ones, if they are asked for ``ahead``, until training needs them.

        Raises what the maker raises when even the quick plan can't be made (nothing fits in memory).
        """
        ring, heard = socket.socketpair()
        with ring, heard:
            asked, arrived = self._wait(request, time.monotonic() + wait_seconds, ahead, ring, heard)
        statistics = self.statistics
        statistics.plans += 1
        if arrived is None:
            known = self._known.plan(asked.request)
            core_seconds = time.thread_time()
            if known is None:
                plans = self._made_here(asked.request)
            else:
                plans = known.plans
                self._corrections[request] = known.corrections
                self._improve(asked.request, known)
            statistics.latency_seconds = time.monotonic() - asked.at
            statistics.core_seconds = time.thread_time() - core_seconds
            return plans
        statistics.late += not arrived.final
        statistics.latency_seconds, statistics.core_seconds = arrived.at - asked.at, arrived.core_seconds
        return arrived.plans

    def _wait(
        self, request: int, deadline: float, ahead: Prefetch | None, ring: socket.socket, heard: socket.socket
    ) -> tuple[_Asked, _Arrived | None]:
        """What was asked, and what has arrived of it when this needn't or can't be waited for any longer. ``ring`` is
        for threads that meanwhile take in what is waited for, ``heard`` its other end."""
        while True:
            with self._lock:
                self._collect()
                arrived = self._arrived.get(request)
                waiting: list[Connection | socket.socket] = [
                    w.connection for w in self._workers if request in w.busy_with and not self._closed
                ]
                left = deadline - time.monotonic()
                bells = []
                if ahead is not None:
                    bells = ahead.bells  # before it is asked, so that no ringing is missed
                    left = ahead.seconds_left(deadline, arrived is not None)
                if (arrived is not None and arrived.final) or not waiting or left <= 0:
                    # Only now: plans for requests nobody asked for are dropped on arrival.
                    self._rings.pop(request, None)
                    asked = self._asked.pop(request)
                    self._arrived = {i: p for i, p in self._arrived.items() if i in self._asked}
                    return asked, arrived
                self._rings[request] = ring
            with contextlib.suppress(OSError):  # another thread has just replaced that worker
                # Now and then somebody has to look whether the worker hangs, also where nobody needs the plan yet.
                if heard in wait([*waiting, heard, *bells], min(left, self._hang_seconds)):
                    heard.recv(1)

    def _ring(self, request: int) -> None:
        """Wake the thread that waits for its plan, if one does: a connection that this thread has read says nothing to
        that one any more."""
        ring = self._rings.pop(request, None)
        if ring is not None:
            ring.send(b"!")

    def _made_here(self, request: PlanRequest) -> PlanSet:
        """Searched for within its budget where batches are planned at the call, else the quick plan."""
        if self._searches_here and request.budget_seconds > 0:
            try:
                plans = self._maker.best(request, lambda _: None)
                verify(*plans.plans)
                self._known.keep(request, plans, searched=False)
                return plans
            except Exception as error:  # as of a worker's: the quick plan may be possible all the same
                logger.warning("planning %s failed: %s: %s", request.subject, type(error).__name__, error)
        # What is needed at once (a first batch, an evaluation) is no worker's business and no failure of one.
        self.statistics.fallbacks += request.budget_seconds > 0
        plans = self._maker.quick(request)
        verify(*plans.plans)
        return plans

    def corrections(self, request: int) -> Corrections | None:
        """Those that the plan just taken was made with, if they aren't the request's; to be asked once."""
        return self._corrections.pop(request, None)

    def _improve(self, request: PlanRequest, known: CachedPlan) -> None:
        """Have an idle worker search for a better plan of such batches, under a number that no request has."""
        with self._lock:
            if known.searched or any(self._known.same(request, r) for r in self._improving.values()):
                return
            wanted = replace(
                request, request=_LONGER + request.request, budget_seconds=self._improve_seconds, deadline=math.inf
            )
            if self._send(wanted, 1):
                self._improving[wanted.request] = request

    def close(self) -> None:
        """End all workers."""
        with self._lock:  # else another thread, which just looks after workers, would replace those that end here
            self._closed = True
            workers, self._workers = self._workers, []
            for worker in workers:
                worker.connection.close()
                worker.process.terminate()
            for request in list(self._rings):
                self._ring(request)
        for worker in workers:
            try:
                worker.process.wait(5.0)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def ready(self) -> bool:
        """Whether a worker can plan; what is asked before is planned in this process."""
        with self._lock:
            self._collect()
            return any(worker.ready for worker in self._workers)

    @property
    def processes(self) -> list[subprocess.Popen[bytes]]:
        """The worker processes, for monitoring."""
        return [w.process for w in self._workers]

    # -- workers -------------------------------------------------------------------------------------------------
    def _start(self) -> _Worker:
        # Not multiprocessing's spawn: it would import the user's pretrain script, and Megatron, into every worker.
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "dip_megatron.planner.worker", str(theirs.fileno()), *["last"] * self._last],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                env={**os.environ, **_WORKER_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )  # fmt: skip
        with ours:
            connection = Connection(os.dup(ours.fileno()))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died, as will be noticed
                connection.send_bytes(pickle.dumps(self._maker))
            # From here on no worker can hold up the trainer with half a message, or by never reading.
            for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, direction, struct.pack("ll", self._silent_seconds, 0))
        return _Worker(process, connection)

    def _replace(self, worker: _Worker, reason: str) -> None:
        """End it and start another; not at once where the one before it hadn't answered either, for whatever ends them
        (a limit of memory) will end the next one, and each takes seconds of a core to load."""
        worker.faults += 1
        pause = min(2.0 ** (worker.faults - 1), _LONGEST_PAUSE) if worker.faults > 1 else 0.0
        when = f" in {pause:.0f} s, as {worker.faults} in a row have answered nothing" if pause else ""
        logger.warning("planner worker %s %s; starting another%s, no step is lost", worker.process.pid, reason, when)
        self.statistics.worker_deaths += 1
        worker.connection.close()
        if worker.process.poll() is None:
            worker.process.kill()
        worker.ready, worker.rests_until = False, time.monotonic() + pause
        for request in worker.busy_with:
            self._ring(request)
        worker.busy_with.clear()
        if not pause:
            self._restart(worker)

    def _restart(self, worker: _Worker) -> None:
        try:
            fresh = self._start()
        except OSError as error:  # no memory, no process or no file left for it
            worker.rests_until = time.monotonic() + _LONGEST_PAUSE
            logger.warning(
                "no planner worker can be started (%s); the trainer plans by itself, and tries again in %.0f s",
                error, _LONGEST_PAUSE,
            )  # fmt: skip
            return
        worker.process, worker.connection, worker.rests_until = fresh.process, fresh.connection, None

    def _collect(self) -> None:
        """Take in what workers have sent; replace the broken ones."""
        now = time.monotonic()
        for worker in self._workers if not self._closed else ():
            if worker.rests_until is not None:
                if now >= worker.rests_until:
                    self._restart(worker)
                continue
            try:
                while worker.connection.poll():
                    self._receive(worker, worker.connection.recv_bytes(_LARGEST_MESSAGE))
            except BlockingIOError:
                self._replace(worker, f"fell silent in the middle of a message for {self._silent_seconds} s")
                continue
            except (EOFError, OSError) as error:
                self._replace(worker, f"has died (exit code {worker.process.poll()}; {type(error).__name__} {error})")
                continue
            except Exception as error:  # whatever garbage a broken worker may send
                self._replace(worker, f"sent something unreadable ({type(error).__name__}: {error})")
                continue
            if worker.process.poll() is not None:
                self._replace(worker, f"has died (exit code {worker.process.poll()})")
            elif worker.busy_with and now - worker.busy_since > self._patience(worker.busy_with[0]):
                self._replace(worker, f"has not answered about {self._subject(worker.busy_with[0])} in time")

    def _patience(self, request: int) -> float:
        """Seconds after which a worker that still plans ``request`` counts as hung."""
        asked = self._asked.get(request)
        budget = self._improve_seconds if asked is None else asked.request.budget_seconds
        return self._hang_seconds + budget

    def _subject(self, request: int) -> str:
        asked = self._asked.get(request)
        return "an iteration that has passed" if asked is None else asked.request.subject

    def _receive(self, worker: _Worker, message: bytes) -> None:
        if message == READY:
            worker.ready = True
            return
        request, plans, final, error, core_seconds = pickle.loads(message)
        self._ring(request)
        if final:
            worker.busy_with.remove(request)
            worker.busy_since, worker.faults = time.monotonic(), 0
        if error is not None:
            logger.warning("planner worker failed on %s: %s", self._subject(request), error)
            self._improving.pop(request, None)
            return
        if request not in self._asked and request not in self._improving:
            return
        try:
            verify(*plans.plans)
        except PlanError as fault:
            logger.warning("planner worker made invalid plans for %s (%s); not used", self._subject(request), fault)
            return
        if request in self._asked:
            self._arrived[request] = _Arrived(plans, final, time.monotonic(), core_seconds)
        elif final:
            self._known.keep(self._improving.pop(request), plans, searched=True)


_QUEUE = 2  # requests at a time: a worker that is late for one iteration may begin with the next as soon as it can
_LONGER = 1 << 40  # numbers of the searches for batches that have come again start here
_LARGEST_MESSAGE = 1 << 28
_LONGEST_PAUSE = 60.0  # seconds in which no worker is started after several that were of no use
_WORKER_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
}
