"""Training over several hosts: plans cross a network, and what happens when a part of it fails."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from examples.llava_digits.runs import SCRIPT, Process, Run, RunFailed, end, environment, train, training_flags
from tests.forked import forked
from tests.hosts.network import Host, hosts, missing

WHY_NOT = missing()
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the runs below are laid out for CPU ranks"),
    pytest.mark.skipif(importlib.util.find_spec("megatron.training") is None, reason="needs megatron.training"),
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]

DIP = ("-m", "dip_megatron.cli", "run")
PATIENCE = 15.0  # seconds that a rank waits for another


def on(places: Sequence[Host]) -> Callable[..., contextlib.AbstractContextManager[Sequence[Process]]]:
    """Starts rank r on ``places[r]``."""

    @contextlib.contextmanager
    def start(command: Sequence[str], logs: Sequence[Path]) -> Iterator[list[subprocess.Popen[bytes]]]:
        processes: list[subprocess.Popen[bytes]] = []
        network = {
            "MASTER_ADDR": places[0].address, "GLOO_SOCKET_IFNAME": "eth0", "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1", "DIP_TIMEOUT_SECONDS": str(PATIENCE),
        }  # fmt: skip
        try:
            for host, log, place in zip(places, logs, environment(len(logs)), strict=True):
                with log.open("wb") as file:
                    processes.append(
                        subprocess.Popen(
                            [*host.prefix, *command], stdout=file, stderr=subprocess.STDOUT, env=place | network
                        )
                    )
            yield processes
        finally:
            end(processes)

    return start


def pretrain(
    out: Path, start: Any, *flags: str, iterations: int = 6, on_iteration: Callable[[int, Run], Any] = lambda *_: None,
    ranks: int = 2,
) -> Run:  # fmt: skip
    small = ["--global-batch-size", "4", "--eval-iters", "1", "--vision-num-layers", "2"]
    command = [sys.executable, *DIP, str(SCRIPT), *training_flags(iterations), *small, "--dip-schedule", "dynamic"]
    return train("run", [*command, *flags], out, on_iteration, ranks=ranks, start=start)


def planner_workers(children_of: int) -> list[psutil.Process]:
    """Planner workers below a process."""
    children = psutil.Process(children_of).children(recursive=True)
    return [p for p in children if "dip_megatron.planner.worker" in " ".join(p.cmdline())]


def test_two_hosts_train_as_one_and_a_planner_that_dies_on_one_costs_the_other_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    alone = pretrain(tmp_path / "one", forked)
    killed: list[int] = []

    def kill(iteration: int, _: Run) -> None:
        if iteration == 2 and not killed:
            for worker in planner_workers(psutil.Process().pid):
                killed.append(worker.pid)
                worker.kill()

    (tmp_path / "two").mkdir()
    with hosts(2) as places:
        delayed = [host.delay(1.0, 0.1) for host in places]
        run = pretrain(tmp_path / "two", on(places), on_iteration=kill)
    # The iteration whose planner died has another plan, and with it another order of float sums.
    assert run.losses == pytest.approx(alone.losses, rel=1e-5)
    assert killed
    assert len(set(delayed)) == 1


def test_a_host_that_vanishes_ends_the_others_in_bounded_time_and_words(tmp_path: Path) -> None:
    unplugged: list[float] = []

    with hosts(2) as places:

        def unplug(iteration: int, _: Run) -> None:
            if iteration == 3 and not unplugged:
                unplugged.append(time.monotonic())
                places[0].unplug()

        with pytest.raises(RunFailed) as failed:
            pretrain(tmp_path, on(places), iterations=400, on_iteration=unplug)
    assert unplugged
    assert time.monotonic() - unplugged[0] < 8 * PATIENCE
    assert "a rank ended with code" in str(failed.value)
    # Where it stood, and for whom it waited; also when it was ended before it could say so itself.
    said = [(tmp_path / f"run.rank{rank}.log").read_text() for rank in range(2)]
    assert any("[dip] stopped at global rank" in text and "waiting for pipeline rank" in text for text in said)
