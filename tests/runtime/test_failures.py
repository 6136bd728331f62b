"""When a rank fails or is killed, the others say where they stood and leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.processes import free_port

SCRIPT = """
import os, sys, signal
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
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
def test_everyone_leaves_and_says_where_it_stood(fault):
    world, root = 3, os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(root=root, fault=fault)],
            env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank),
                 "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    deadline = time.monotonic() + 150
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=max(deadline - time.monotonic(), 1.0))[1])
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            pytest.fail("a rank hangs after another's failure")
    assert [p.returncode != 0 for p in processes] == [True] * world
    if fault == "killed":
        assert processes[-1].returncode == -signal.SIGKILL
    else:
        assert "the loss went up in flames" in outputs[-1]
    for rank, text in enumerate(outputs[:-1]):
        assert f"pipeline rank {rank}" in text, text
        assert "action" in text or "ended its plan" in text, text
        # Both other ranks are neighbours of the one that is gone, the ring being of three.
        assert fault == "raises" or f"rank {world - 1}" in text, text
