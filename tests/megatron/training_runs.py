"""Whole training runs of the example on gloo ranks, forked from a process that has imported Megatron already."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import runpy
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from examples.llava_digits.quickstart import SCRIPT, Run

from ..processes import free_port

TINY = shlex.split((SCRIPT.parent / "tiny.args").read_text(), comments=True)
_IMPORTS = ["tests.megatron.imported"]


_NORM = re.compile(r" iteration +(\d+)/.* grad norm: ([\d.]+) \|")


@dataclass(frozen=True)
class Trained:
    """Loss and norm of the gradients by iteration.

    The second iteration of a run has no loss here: Megatron's line for it says the mean of the first two.
    """

    losses: dict[int, float]
    norms: dict[int, float]


class RunFailed(AssertionError):
    """A rank ended with an error; the message has the end of its log."""


def train(folder: Path, name: str, ranks: int, *flags: str, hooks: bool = True, seconds: float = 200.0) -> Trained:
    """Train on ``ranks`` processes, logging to ``folder/NAME.rankR.log``; ``hooks`` as ``dip run`` installs them.

    Returns what the last rank logged. Raises RunFailed.
    """
    logs = [folder / f"{name}.rank{rank}.log" for rank in range(ranks)]
    arguments = [str(SCRIPT), *TINY, *flags]
    port = free_port()
    context = _context()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, arguments, hooks, str(log)))
        for rank, log in enumerate(logs)
    ]
    with _started(processes):
        until = time.monotonic() + seconds
        while any(p.exitcode is None for p in processes):
            failed = [rank for rank, p in enumerate(processes) if p.exitcode not in (None, 0)]
            if failed or time.monotonic() > until:
                break
            time.sleep(0.05)
        time.sleep(0.1)
        failed = [rank for rank, p in enumerate(processes) if p.exitcode != 0]
        if failed:
            first = min(failed, key=lambda rank: processes[rank].exitcode is None)
            words = logs[first].read_text(errors="replace")[-3000:]
            raise RunFailed(f"{name}: rank {first} ended with {processes[first].exitcode}\n{words}")
    run, norms = Run(), {}
    for line in logs[-1].read_text(errors="replace").splitlines():
        run.read(line)
        if found := _NORM.search(line):
            norms[int(found[1])] = float(found[2])
    second = min(run.losses, default=0) + 1
    return Trained({iteration: loss for iteration, loss in run.losses.items() if iteration != second}, norms)


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)
    return context


@contextlib.contextmanager
def _started(processes: Sequence[Any]) -> Iterator[None]:
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _rank(rank: int, world: int, port: int, arguments: list[str], hooks: bool, log: str) -> None:
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    sys.argv = arguments
    if hooks:
        import dip_megatron

        dip_megatron.install()
    runpy.run_path(arguments[0], run_name="__main__")
