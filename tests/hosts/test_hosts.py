"""Training over several hosts: plans cross a network, and what happens when a part of it fails."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dip_megatron.ports import held_port
from examples.llava_digits.runs import SCRIPT, Process, Run, RunFailed, end, environment, train, training_flags
from tests.forked import Forked, forked
from tests.hosts.network import Host, Links, hosts, missing
from tests.marks import needs_megatron_training, on_cpu_ranks

WHY_NOT = missing()
pytestmark = [
    on_cpu_ranks,
    needs_megatron_training,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]

DIP = ("-m", "dip_megatron.cli", "run")
INSTALLED = ("-m", "tests.examples.installed")
PATIENCE, LITTLE = 240.0, 25.0  # seconds that a rank waits for another
LINKS = Links(delay=1e-3, jitter=5e-4, loss=5e-3)


def on(
    places: Sequence[Host], ended: list[int] | None = None, patience: float = PATIENCE, **more: str
) -> Callable[..., contextlib.AbstractContextManager[Sequence[Process]]]:
    """Starts rank r on ``places[r]``, with ``more`` in its environment. ``ended`` takes with what status each has ended
    by itself; raises TimeoutExpired if one doesn't."""

    @contextlib.contextmanager
    def start(command: Sequence[str], logs: Sequence[Path]) -> Iterator[list[Forked]]:
        processes: list[Forked] = []
        network = {
            "MASTER_ADDR": places[0].address, "GLOO_SOCKET_IFNAME": "eth0", "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1", "DIP_TIMEOUT_SECONDS": str(patience), **more,
        }  # fmt: skip
        try:
            with held_port() as port:
                for host, log, place in zip(places, logs, environment(len(logs), port), strict=True):
                    log.write_bytes(b"")
                    processes.append(Forked(command, place | network, log, enter=host.enter))
                yield processes
        finally:
            try:
                if ended is not None:
                    ended.extend(process.wait(timeout=PATIENCE) for process in processes)
            finally:
                end(processes)

    return start


def pretrain(
    out: Path, start: Any, *flags: str, iterations: int = 6, on_iteration: Callable[[int, Run], Any] = lambda *_: None,
    ranks: int = 2, launcher: Sequence[str] = DIP,
) -> Run:  # fmt: skip
    small = ["--global-batch-size", "4", "--eval-iters", "1", "--vision-num-layers", "2"]
    command = [sys.executable, *launcher, str(SCRIPT), *training_flags(iterations), *small, "--dip-schedule", "dynamic"]
    return train("run", [*command, *flags], out, on_iteration, ranks=ranks, start=start)


def test_two_hosts_train_as_one_and_a_planner_that_dies_on_one_costs_the_other_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    alone = pretrain(tmp_path / "one", forked)
    (tmp_path / "two").mkdir()
    with hosts(2, LINKS) as (places, wire):
        assert places[0].round_trip(places[1].address) >= 2 * LINKS.delay
        run = pretrain(tmp_path / "two", on(places, DIP_TEST_KILLED="3"), launcher=INSTALLED)
        packets = wire.packets()
    # The iteration whose planner died has another plan, and with it another order of float sums.
    assert run.losses == pytest.approx(alone.losses, rel=1e-5)
    assert "starting another, no step is lost" in (tmp_path / "two" / "run.rank0.log").read_text()
    assert packets.lost > 0


def test_replicas_over_four_hosts_exchange_microbatches_and_train_as_on_one(tmp_path: Path) -> None:
    flags = ("--dip-balance", "swap")
    (tmp_path / "one").mkdir()
    alone = pretrain(tmp_path / "one", forked, *flags, ranks=4)
    (tmp_path / "four").mkdir()
    with hosts(4, LINKS) as (places, wire):
        run = pretrain(tmp_path / "four", on(places), *flags, ranks=4)
        packets = wire.packets()
    assert run.losses == pytest.approx(alone.losses, rel=1e-5)
    assert packets.lost > 0


def test_a_host_that_vanishes_ends_all_others_in_bounded_time_and_words(tmp_path: Path) -> None:
    cut: list[int] = []
    ended: list[int] = []

    with hosts(4, LINKS) as (places, wire):

        def unplug(iteration: int, _: Run) -> None:
            if iteration == 3 and not cut:
                cut.append(iteration)
                wire.cut(places[0].address)  # that of the store, too

        with pytest.raises(RunFailed) as failed:
            pretrain(tmp_path, on(places, ended, LITTLE), iterations=2000, on_iteration=unplug, ranks=4)
    assert cut
    assert "a rank ended with code" in str(failed.value)
    assert len(ended) == 4
    assert 0 not in ended
    # Where each stood, and for whom it waited; some wait in Megatron's own collectives of the other replica.
    said = [(tmp_path / f"run.rank{rank}.log").read_text() for rank in range(4)]
    assert all("[dip] stopped at global rank" in text or "stops where it stood" in text for text in said)
    assert any(re.search(r"\[dip\] stopped at .* waiting for (pipeline|global) rank", text) for text in said)
