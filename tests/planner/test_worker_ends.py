"""Planner workers that die, once or again and again, and trainers that do."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dip_megatron.planner.service import PlannerService
from tests.planner.makers import Maker, name_of
from tests.planner.test_service import request, until, wait_until_planning_again, wait_until_ready


@pytest.fixture
def start() -> Iterator[Callable[[str], PlannerService]]:
    """A service with a worker of this fault."""
    services = []

    def one(fault: str = "") -> PlannerService:
        services.append(PlannerService(Maker(fault), 1))
        return services[-1]

    yield one
    for service in services:
        service.close()


def until_it_has_died(service: PlannerService, times: int) -> None:
    """Its ends, so many by now, have been noticed; nobody has looked after it since."""

    def noticed() -> bool:
        if service.statistics.worker_deaths < times:
            service.ready()
        return service.statistics.worker_deaths == times

    until(noticed, "its end is noticed")


def test_workers_that_die_again_and_again_are_started_less_and_less_often(start, caplog):
    """As where a limit of memory ends each of them: training goes on with plans of its own, and they take no core."""
    service = start("dies")
    for died in (1, 2):
        wait_until_ready(service)
        service.submit(request(1))
        assert name_of(service.take(1, 60.0)) == "greedy"
        until_it_has_died(service, died)
        assert (service._workers[0].rests_until is None) == (died == 1)  # whether the next one was started at once
    assert "starting another in 2 s, as 2 in a row have answered nothing, no step is lost" in caplog.text
    wait_until_planning_again(service)
    service.submit(request(1))
    assert name_of(service.take(1, 60.0)) == "greedy"
    until_it_has_died(service, 3)
    assert "3 in a row" not in caplog.text  # one has answered in between


def test_where_no_worker_can_be_started_the_trainer_plans(start, caplog, monkeypatch):
    service = start()
    wait_until_ready(service)

    def nothing_left(*_: Any, **__: Any) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", nothing_left)
    service.processes[0].kill()
    service.processes[0].wait()
    service.submit(request(2))
    assert name_of(service.take(2, 60.0)) == "greedy"
    assert "no planner worker can be started ([Errno 11] Resource temporarily unavailable)" in caplog.text
    monkeypatch.undo()
    service._workers[0].rests_until = 0.0
    wait_until_planning_again(service)


def test_a_killed_worker_is_replaced(start, caplog):
    service = start()
    wait_until_ready(service)
    os.kill(service.processes[0].pid, signal.SIGKILL)
    service.processes[0].wait()
    service.submit(request(5))
    assert name_of(service.take(5, 0.5)) == "greedy"
    assert "starting another, no step is lost" in caplog.text
    wait_until_planning_again(service)


def test_a_worker_leaves_at_once_when_its_trainer_is_killed(tmp_path):
    """Though it hangs, or searches for long."""
    program = """
    import os, signal, sys, time
    from tests.planner.makers import Maker, name_of
    from tests.planner.test_service import request, wait_until_ready
    from dip_megatron.planner.service import PlannerService
    service = PlannerService(Maker("hangs"), 1)
    wait_until_ready(service)
    service.submit(request(1))
    time.sleep(0.5)
    print(service.processes[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    text = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, check=False, text=True
    ).stdout
    worker = Path(f"/proc/{int(text)}/stat")

    def gone() -> bool:
        try:
            return worker.read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True

    until(gone, "the worker leaves")
