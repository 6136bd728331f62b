"""Planner workers on real processes: what they plan arrives, and what befalls them costs no iteration."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

from dip_megatron.core.verify import verify
from dip_megatron.describe.workload import Microbatch
from dip_megatron.planner.prefetch import Prefetch
from dip_megatron.planner.request import PlanRequest
from dip_megatron.planner.service import PlannerService
from dip_megatron.planner.worker import serve
from tests.planner.makers import GARBAGE, Maker, name_of, priority


def request(iteration: int, budget: float = 0.1) -> PlanRequest:
    return PlanRequest(iteration, ((Microbatch(8),),), budget)


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for it as long as a busy machine may take."""
    deadline = time.monotonic() + 240
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} not within four minutes")
        time.sleep(0.02)  # a worker wants the core


def wait_until_ready(service: PlannerService) -> None:
    """A worker answers once it has warmed up; before, the trainer plans by itself."""
    until(service.ready, "a worker is ready")


def wait_until_planning_again(service: PlannerService) -> None:
    """What befell its worker is over."""
    wait_until_ready(service)
    service.submit(request(2))
    assert name_of(service.take(2, 60.0)) == "worker"


@contextmanager
def held(process: subprocess.Popen[bytes]) -> Iterator[Callable[[], None]]:
    """The worker does nothing within the block, or until it is let go."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield partial(os.kill, process.pid, signal.SIGCONT)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGCONT)


@pytest.fixture
def service_of():
    services = []

    def start(fault: str = "", **options) -> PlannerService:
        services.append(PlannerService(Maker(fault), 1, **options))
        return services[-1]

    yield start
    for service in services:
        service.close()


def test_plans_of_workers_arrive(service_of):
    service = service_of()
    wait_until_ready(service)
    before = service.statistics.fallbacks
    for iteration in range(20_000, 20_005):
        service.submit(request(iteration))
        plan = service.take(iteration, 60.0)
        assert name_of(plan) == "worker"
        verify(*plan.plans)
    assert service.statistics.fallbacks == before


def wait_until_searching(service: PlannerService) -> None:
    """Batches that are planned at the call are searched for in this process, once a worker has what that needs."""
    numbers = itertools.count(30_000)

    def searched() -> bool:
        number = next(numbers)
        service.submit(PlanRequest(number, ((Microbatch(number),),), 0.1))  # no two batches are the same
        return name_of(service.take(number, 0.0)) == "worker"

    until(searched, "a batch is searched for")


def test_a_batch_that_comes_again_has_a_plan_at_once_and_soon_a_searched_one(service_of):
    service = service_of(improve_seconds=0.1)
    wait_until_searching(service)
    fallbacks = service.statistics.fallbacks
    service.submit(request(20_000))
    known = service.take(20_000, 0.0)
    assert name_of(known) == "worker"
    again, numbers = known, itertools.count(20_001)

    def improved() -> bool:
        nonlocal again
        number = next(numbers)
        service.submit(request(number))
        again = service.take(number, 0.0)
        return again.digest() != known.digest()

    until(improved, "a longer search ends")
    # The worker's, of the request that came second: of another graph here, so that it is known again.
    assert again.digest() == Maker().best(request((1 << 40) + 20_001), lambda _: None).digest()
    service.submit(PlanRequest(10_300, ((Microbatch(9),),), 0.1))
    assert service.take(10_300, 0.0).digest() not in (known.digest(), again.digest())
    service.submit(PlanRequest(10_301, ((Microbatch(8),),), 0.0, forward_only=True))
    assert name_of(service.take(10_301, 0.0)) == "greedy"
    assert service.statistics.fallbacks == fallbacks


def test_what_cannot_be_searched_for_at_the_call_has_the_quick_plan(service_of, caplog):
    service = service_of("raises", improve_seconds=0.1)
    wait_until_searching(service)
    service.submit(PlanRequest(1, ((Microbatch(7),),), 0.1))
    assert name_of(service.take(1, 0.0)) == "greedy"
    assert "planning iteration 0 failed: RuntimeError: no luck" in caplog.text


def test_one_thread_submits_while_another_takes(service_of):
    """As an evaluation does while the next training batch's plan is awaited."""
    service = service_of()
    wait_until_ready(service)
    begun, done = threading.Event(), threading.Event()

    def evaluate() -> None:
        count = 0
        while not done.is_set():
            service.submit(request(50_000 + count, budget=0.0))
            service.take(50_000 + count, 0.0)
            count += 1
            begun.set()
            time.sleep(0.01)  # as much as the least iteration

    with ThreadPoolExecutor(1) as pool:
        evaluations = pool.submit(evaluate)
        try:
            assert begun.wait(60.0)
            for iteration in range(10_000_000, 10_000_010):
                service.submit(request(iteration))
                assert name_of(service.take(iteration, 60.0)) == "worker"
        finally:
            done.set()
        evaluations.result()
    assert service.statistics.worker_deaths == 0


@pytest.mark.parametrize("fault", ["", "raises", "dies"])
def test_what_another_thread_takes_in_wakes_the_one_that_waits(service_of, monkeypatch, fault):
    """An evaluation looks after workers, too: it may read the plan that was waited for, or bury who was to make it."""
    service = service_of(fault)
    wait_until_ready(service)
    worker = service.processes[0]
    woken: list[list[Any]] = []

    def wait_meanwhile(objects, timeout):
        let_go()
        while any(request == 1 for w in service._workers for request in w.busy_with):
            with ThreadPoolExecutor(1) as another:
                another.submit(service.ready).result()
            time.sleep(0.01)
        woken.append(wait([one for one in objects if isinstance(one, socket.socket)], 0.0))
        return woken[-1]

    with held(worker) as let_go:  # so that it can't have answered before anyone waits
        service.submit(request(1))
        monkeypatch.setattr("dip_megatron.planner.service.wait", wait_meanwhile)
        assert name_of(service.take(1, 60.0)) == ("greedy" if fault else "worker")
    assert [len(found) for found in woken] == [1]
    assert (service.processes[0] is worker) == (fault != "dies")


def first_plan_is_there(service: PlannerService) -> bool:
    """Of request 1."""
    service.ready()  # takes in what has come
    return 1 in service._arrived


def test_without_workers_the_trainer_plans(service_of):
    service = PlannerService(Maker(), 0)
    service.submit(request(0))
    assert name_of(service.take(0, 5.0)) == "greedy"
    assert service.statistics.fallbacks == 1


@pytest.mark.parametrize(
    ("fault", "expected"), [("dies", "greedy"), ("raises", "greedy"), ("invalid", "greedy"), ("late", "first")]
)
def test_a_faulty_worker_costs_no_iteration(service_of, fault, expected):
    service = service_of(fault)
    wait_until_ready(service)
    service.submit(request(1))
    if fault == "late":
        until(partial(first_plan_is_there, service), "a first plan comes")
    plan = service.take(1, 0.2 if fault == "late" else 60.0)
    assert name_of(plan) == expected
    verify(*plan.plans)
    if fault != "late":
        wait_until_planning_again(service)


def test_a_first_plan_is_waited_for_until_training_needs_it(service_of):
    service = service_of("slow")
    wait_until_ready(service)
    before = service.statistics.fallbacks
    with Prefetch(hurries=False) as ahead:
        service.submit(request(1))
        assert name_of(service.take(1, 0.0, ahead)) == "worker"
    assert service.statistics.fallbacks == before
    with Prefetch(hurries=False) as ahead, held(service.processes[0]):
        service.submit(request(1))
        ahead.need()
        assert name_of(service.take(1, 0.0, ahead)) == "greedy"
    assert service.statistics.fallbacks == before + 1


@pytest.mark.parametrize("hurries", [False, True])
def test_a_first_plan_will_do_once_training_that_hurries_waits(service_of, hurries):
    service = service_of("late")
    wait_until_ready(service)
    with Prefetch(hurries) as ahead, ThreadPoolExecutor(1) as pool:
        service.submit(request(1))
        taken = pool.submit(service.take, 1, 600.0 if hurries else 0.5, ahead)
        until(lambda: 1 in service._arrived or taken.done(), "a first plan comes")
        assert not (hurries and taken.done())
        ahead.need()
        assert name_of(taken.result(60.0)) == "first"
    assert service.statistics.late == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have the priority of their process")
@pytest.mark.parametrize("last", [False, True])
def test_workers_come_last_once_a_plan_is_there(service_of, last):
    service = service_of("tells its priorities", last=last)
    wait_until_ready(service)
    for _ in range(2):
        service.submit(request(1))
        assert name_of(service.take(1, 60.0)) == f"{19 if last else priority()}, then 19"


@pytest.mark.parametrize("fault", GARBAGE)
def test_a_babbling_worker_is_replaced(service_of, fault, caplog):
    service = service_of(fault, silent_seconds=1)
    wait_until_ready(service)
    babbling = service.processes[0].pid
    service.submit(request(1))
    assert name_of(service.take(1, 60.0)) == "greedy"
    assert service.processes[0].pid != babbling
    assert service.statistics.worker_deaths == 1
    assert "starting another, no step is lost" in caplog.text


def test_a_late_worker_goes_on_with_the_next_iteration(service_of):
    service = service_of("slow")
    wait_until_ready(service)
    before = service.statistics.fallbacks
    with held(service.processes[0]):
        service.submit(request(1))
        assert name_of(service.take(1, 0.0)) == "greedy"
    service.submit(request(2))
    assert name_of(service.take(2, 60.0)) == "worker"
    assert service.statistics.fallbacks == before + 1
    assert service.statistics.worker_deaths == 0
    assert service.statistics.latency_seconds > 0


def test_that_workers_are_busy_is_told_once(service_of, caplog):
    caplog.set_level("INFO")
    service = service_of()
    wait_until_ready(service)
    with held(service.processes[0]):
        for iteration in range(1, 7):
            service.submit(request(iteration))
            assert name_of(service.take(iteration, 0.0)) == "greedy"
    assert caplog.text.count("all planner workers are busy") == 1
    wait_until_planning_again(service)


def test_a_hanging_worker_is_replaced(service_of, monkeypatch):
    service = service_of("hangs")
    wait_until_ready(service)
    service.submit(request(1))
    hung = service.processes[0].pid
    time.sleep(1.0)
    monkeypatch.setattr(service, "_hang_seconds", 0.5)
    assert name_of(service.take(1, 1.0)) == "greedy"
    monkeypatch.undo()  # the next one is slow, at most
    assert service.processes[0].pid != hung
    wait_until_planning_again(service)
    assert service.statistics.worker_deaths == 1


def test_a_hanging_worker_is_noticed_though_nobody_needs_its_plan(service_of, monkeypatch):
    """A process that ends waits for the thread that waits for the plan."""
    service = service_of("hangs")
    wait_until_ready(service)
    monkeypatch.setattr(service, "_hang_seconds", 0.5)
    with Prefetch(hurries=False) as ahead:
        service.submit(request(1))
        assert name_of(service.take(1, 0.0, ahead)) == "greedy"
    monkeypatch.undo()
    assert service.statistics.worker_deaths == 1


def test_a_worker_leaves_with_its_trainer(service_of):
    service = service_of()
    process = service.processes[0]
    service.close()
    assert process.wait(20) is not None


def test_a_worker_that_gets_ready_after_its_trainer_has_ended_leaves_without_a_word():
    ours, theirs = socket.socketpair()
    Connection(ours.detach()).send_bytes(pickle.dumps(Maker("")))  # and is closed
    serve(Connection(theirs.detach()))


def test_nobody_looks_after_workers_while_they_end(service_of, monkeypatch):
    """Or the worker that has just been closed would be taken for a broken one, and another started that nobody ends."""
    started: list[Any] = []
    start = PlannerService._start

    def note(self):
        started.append(start(self))
        return started[-1]

    monkeypatch.setattr(PlannerService, "_start", note)
    service = service_of("half a message", silent_seconds=1)
    wait_until_ready(service)
    service.submit(request(1))
    until(service._workers[0].connection.poll, "half a message comes")

    def looked_after() -> bool:
        free = service._lock.acquire(blocking=False)
        if free:
            service._lock.release()
        return not free

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(service.ready)
        until(lambda: looked_after() or looking.done(), "another thread looks after the worker")
        service.close()
    assert len(started) == 2
    assert all(worker.process.poll() is not None for worker in started)
