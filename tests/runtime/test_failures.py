"""When a rank fails or is killed, the others say where they stood and leave."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from tests.forked import forked

SCRIPT = """
import os, signal
import torch
from dip_megatron.runtime.watch import Watchdog
import tests.runtime.dip_case as dip_case
from tests.runtime.llava_case import Case, initialize
rank, world, fault = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), {fault!r}
initialize(world)
from dip_megatron.runtime.executor import Executor
from dip_megatron.megatron.forward_backward import DipForwardBackward
construct, run = DipForwardBackward.__init__, Executor._backward

def watched(self, program, executor, *rest, **options):
    store = torch.distributed.distributed_c10d._get_default_store()
    options["watchdog"] = Watchdog(store, executor.position, rank, interval_seconds=0.2, grace_seconds=1.0)
    construct(self, program, executor, *rest, **options)

def faulty(self, *arguments):
    if rank == world - 1:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the loss went up in flames")
    return run(self, *arguments)

DipForwardBackward.__init__, Executor._backward = watched, faulty
dip_case.dip_run(rank, world, Case((2, 0, 3, 1), vision=((1,) * world,), language=((1,) * world,)))
"""


@pytest.mark.parametrize("fault", ["raises", "killed"])
def test_everyone_leaves_and_says_where_it_stood(fault, tmp_path):
    world = 3
    logs = [tmp_path / f"rank{rank}.log" for rank in range(world)]
    with forked([sys.executable, "-c", SCRIPT.format(fault=fault)], logs) as processes:
        deadline = time.monotonic() + 150
        while None in (codes := [process.poll() for process in processes]):
            assert time.monotonic() < deadline, "a rank hangs after another's failure"
            time.sleep(0.05)
    outputs = [log.read_text() for log in logs]
    assert [code != 0 for code in codes] == [True] * world
    if fault == "killed":
        assert codes[-1] == -signal.SIGKILL
    else:
        assert "the loss went up in flames" in outputs[-1]
    for rank, text in enumerate(outputs[:-1]):
        assert f"pipeline rank {rank}" in text, text
        assert "action" in text or "ended its plan" in text, text
        # Both other ranks are neighbours of the one that is gone, the ring being of three.
        assert fault == "raises" or f"rank {world - 1}" in text, text
