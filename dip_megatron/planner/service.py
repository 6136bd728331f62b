"""Planner workers: processes that plan iteration t+1 while t trains.

The trainer never waits for more than it allows: a worker first hands over a quick plan, then its best; a dead, hanging
or babbling worker is replaced with a warning, and the trainer plans by itself meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from ..schedule import Plan
from ..schedule.verify import PlanError, verify
from .request import READY, PlanMaker, PlanRequest
from .warm import warm_up_plans

logger = logging.getLogger(__name__)


@dataclass
class PlannerStatistics:
    """Counts and seconds since the start of training."""

    plans: int = 0
    fallbacks: int = 0
    worker_deaths: int = 0
    late: int = 0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    ready: bool = False
    busy_with: int | None = None


class PlannerService:
    """Plans requests in worker processes.

    Requests go to idle workers in turn. ``take`` returns the best plan that has arrived, verified; or a quick one made
    in this process.
    """

    def __init__(self, maker: PlanMaker, workers: int = 1, hang_seconds: float = 60.0):
        """``workers`` 0 plans in this process only. A worker that is ``hang_seconds`` late is killed and replaced."""
        self.statistics = PlannerStatistics()
        self._maker = maker
        self._hang_seconds = hang_seconds
        self._workers = [self._start() for _ in range(workers)]
        self._asked: dict[int, tuple[PlanRequest, float]] = {}
        self._arrived: dict[int, tuple[Plan, bool]] = {}
        # An evaluation submits its batch while the feed's thread still waits for the next training batch's plan.
        self._lock = threading.RLock()
        # Plans are verified here: loaded while the model is built.
        threading.Thread(target=warm_up_plans, name="dip-warm-up", daemon=True).start()

    def submit(self, request: PlanRequest) -> None:
        """Begin planning; returns at once. May be called while another thread is in :meth:`take`."""
        with self._lock:
            self._submit(request)

    def _submit(self, request: PlanRequest) -> None:
        self._collect()
        self._asked[request.iteration] = (request, time.monotonic())
        if request.budget_seconds <= 0:
            return  # needed now: made in this process when it is taken
        for worker in self._workers:
            if worker.ready and worker.busy_with is None:
                try:
                    worker.connection.send_bytes(pickle.dumps(request))
                    worker.busy_with = request.iteration
                    return
                except OSError:
                    self._replace(worker, "has died")
                    self._submit(request)
                    return
        if any(worker.ready for worker in self._workers):
            self.statistics.late += 1
            logger.info("all planner workers are busy; iteration %d is planned in the trainer", request.iteration)

    def take(self, iteration: int, wait_seconds: float) -> Plan:
        """The best plan for a submitted iteration, waiting at most ``wait_seconds`` for a worker's final one.

        Raises what the maker raises when even the quick plan can't be made (nothing fits in memory).
        """
        deadline = time.monotonic() + wait_seconds
        while True:
            with self._lock:
                self._collect()
                plan, final = self._arrived.get(iteration, (None, False))
                waiting = [w.connection for w in self._workers if w.busy_with == iteration]
                left = deadline - time.monotonic()
                if final or not waiting or left <= 0:
                    # Only now: plans for iterations nobody asked for are dropped on arrival.
                    request, _ = self._asked.pop(iteration)
                    self._arrived = {i: p for i, p in self._arrived.items() if i in self._asked}
                    break
            with contextlib.suppress(OSError):  # another thread has just replaced that worker
                wait(waiting, left)
        self.statistics.plans += 1
        if plan is None:
            self.statistics.fallbacks += 1
            plan = self._maker.quick(request)
            verify(plan)
        elif not final:
            self.statistics.late += 1
        return plan

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            try:
                worker.process.wait(5.0)
            except subprocess.TimeoutExpired:
                worker.process.kill()
        self._workers = []

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
                [sys.executable, "-m", "dip_megatron.planner.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                env={**os.environ, **_WORKER_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )  # fmt: skip
        connection = Connection(ours.detach())
        connection.send_bytes(pickle.dumps(self._maker))
        return _Worker(process, connection)

    def _replace(self, worker: _Worker, reason: str) -> None:
        logger.warning("planner worker %s %s; starting another, no step is lost", worker.process.pid, reason)
        self.statistics.worker_deaths += 1
        worker.connection.close()
        if worker.process.poll() is None:
            worker.process.kill()
        fresh = self._start()
        worker.process, worker.connection, worker.ready, worker.busy_with = fresh.process, fresh.connection, False, None

    def _collect(self) -> None:
        """Take in what workers have sent; replace the broken ones."""
        now = time.monotonic()
        for worker in self._workers:
            try:
                while worker.connection.poll():
                    self._receive(worker, worker.connection.recv_bytes())
            except (EOFError, OSError):
                self._replace(worker, f"has died (exit code {worker.process.poll()})")
                continue
            except Exception as error:  # whatever garbage a broken worker may send
                self._replace(worker, f"sent something unreadable ({type(error).__name__}: {error})")
                continue
            if worker.process.poll() is not None:
                self._replace(worker, f"has died (exit code {worker.process.poll()})")
            elif worker.busy_with is not None:
                asked = self._asked.get(worker.busy_with)
                if asked and now - asked[1] > asked[0].budget_seconds + self._hang_seconds:
                    self._replace(worker, f"is {self._hang_seconds:.0f} s late")
                elif asked is None and worker.busy_with not in self._arrived:
                    # Its iteration was taken without it; it hangs if the next ones pass too.
                    self._check_overdue(worker)

    def _check_overdue(self, worker: _Worker) -> None:
        newest = max(self._asked, default=worker.busy_with or 0)
        if worker.busy_with is not None and newest - worker.busy_with > 3:
            self._replace(worker, f"still plans iteration {worker.busy_with} at {newest}")

    def _receive(self, worker: _Worker, message: bytes) -> None:
        if message == READY:
            worker.ready = True
            return
        iteration, plan, final, error = pickle.loads(message)
        if final:
            worker.busy_with = None
        if error is not None:
            logger.warning("planner worker failed on iteration %s: %s", iteration, error)
            return
        try:
            verify(plan)
        except PlanError as fault:
            logger.warning("planner worker made an invalid plan for iteration %s (%s); not used", iteration, fault)
            return
        if iteration in self._asked:
            self._arrived[iteration] = (plan, final)


_WORKER_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
}
