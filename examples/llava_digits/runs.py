"""Training runs as processes of this machine: one per rank, their logs read while they train."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dip_megatron.ports import held_port

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SCRIPT = HERE / "pretrain_llava_digits.py"
RANKS = 2
SILENCE = 600.0  # seconds without a new line until a run counts as stuck

_ITERATION = re.compile(
    r"iteration +(\d+)/ *\d+ .*elapsed time per iteration \(ms\): ([\d.]+).* lm loss: ([\d.E+-]+)"
    r"(?:.* digit accuracy: ([\d.E+-]+))?"
)
_HELD_OUT = re.compile(r"on test set .*digit accuracy value: ([\d.E+-]+)")


class RunFailed(Exception):
    """A training run that ended early; the message says where to look."""


@dataclass
class Run:
    """What Megatron's log of one run says: loss and seconds by iteration, accuracy on images never trained on."""

    losses: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    accuracy: float | None = None

    def read(self, line: str) -> int | None:
        """Take note of a line; the number of the iteration it reports, if any."""
        if held_out := _HELD_OUT.search(line):
            self.accuracy = float(held_out[1])
        found = _ITERATION.search(line)
        if found is None:
            return None
        iteration = int(found[1])
        self.seconds[iteration] = float(found[2]) / 1e3
        self.losses[iteration] = float(found[3])
        return iteration


def training_flags(iterations: int, file: str = "tiny.args") -> list[str]:
    """The flags in ``file`` beside the script, on ``RANKS`` ranks, with the same initial weights under any schedule."""
    flags = shlex.split((HERE / file).read_text(), comments=True)
    return [
        *flags, "--train-iters", str(iterations), "--pipeline-model-parallel-size", str(RANKS), "--weights-by-name",
    ]  # fmt: skip


class Process(Protocol):
    """What is asked of a rank's process: methods of subprocess.Popen."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


Start = Callable[[Sequence[str], Sequence[Path]], AbstractContextManager[Sequence[Process]]]
"""Starts a command once per log, and ends what still runs with the block."""


def environment(ranks: int, port: int) -> list[dict[str, str]]:
    """Environment variables of each of ``ranks`` processes on this machine, the first of which listens on ``port``."""
    common = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return [{**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def end(processes: Sequence[Process]) -> None:
    """End whatever of them still runs."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def started(command: Sequence[str], logs: Sequence[Path]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One process per rank and log, ended with the block whatever happens."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with held_port() as port:
            for log, place in zip(logs, environment(len(logs), port), strict=True):
                with log.open("wb") as file:
                    processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=place))
            yield processes
    finally:
        end(processes)


def train(
    name: str,
    command: Sequence[str],
    out: Path,
    on_iteration: Callable[[int, Run], Any],
    ranks: int = RANKS,
    start: Start = started,
) -> Run:
    """Run ``command`` on every rank, logging to ``out/NAME.rankR.log``.

    Raises RunFailed when a rank fails or the run falls silent.
    """
    run, text = Run(), ""
    logs = [out / f"{name}.rank{rank}.log" for rank in range(ranks)]
    with start(command, logs) as processes, logs[-1].open() as lines:
        heard = time.monotonic()
        while True:
            codes = [process.poll() for process in processes]
            text += lines.read()
            *complete, text = text.split("\n")
            for line in complete:
                heard = time.monotonic()
                iteration = run.read(line)
                if iteration is not None:
                    on_iteration(iteration, run)
            for log, code in zip(logs, codes, strict=True):
                if code not in (None, 0):
                    raise RunFailed(f"{name}: a rank ended with code {code}: {_last_words(log)} (all of it: {log})")
            if all(code == 0 for code in codes):
                return run
            if time.monotonic() - heard > SILENCE:
                raise RunFailed(f"{name}: no sign of life for {SILENCE:.0f} s; look into {logs[0]} and {logs[-1]}")
            time.sleep(0.1)


def _last_words(log: Path) -> str:
    """The last line that names an error, or just the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"Error|dip:|error:", line)]
    return (named or lines or ["no output"])[-1][:300]
