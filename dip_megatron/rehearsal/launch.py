"""Starts the ranks of a rehearsal, waits for them, launches the job again where one was to die, and reads what they
wrote."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from ..ports import held_port
from .job import CHECKPOINT, Fault, Job

PRELOADED = "dip_megatron.rehearsal.preloaded"
LEAVING_SECONDS = 180.0
"""For which the other ranks may take to leave after one has died."""

_ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_WORDS = re.compile(r"\[dip\] (?:stopped at|global rank \d+ stops)")


class RehearsalError(ValueError):
    """A rehearsal that came to no end; the message says which rank broke off and why."""


@dataclass(frozen=True)
class Restart:
    """A rank died as was asked for: ``others_left_seconds`` until the last of the others had left, of which ``told``
    said where they stood; the job went on with iteration ``resumed``, after ``launch_seconds``."""

    fault: Fault
    others_left_seconds: float
    told: int
    resumed: int
    launch_seconds: float


@dataclass(frozen=True)
class Lines:
    """What the ranks wrote. ``iterations[rank]``: a dict for each iteration, the last time it ran; ``held[rank]``: what
    it had of the machine at its end; ``ready_seconds``: from the start of the first process until all could train."""

    iterations: list[list[dict[str, Any]]]
    held: list[dict[str, Any]]
    ready_seconds: float
    restarts: tuple[Restart, ...]


def rehearse(job: Job, folder: Path, limit_seconds: float, progress: Callable[[str], None] = lambda _: None) -> Lines:
    """Run the job, whose prices are in ``folder``. Raises RehearsalError."""
    deadline = time.monotonic() + limit_seconds
    restarts: list[Restart] = []
    died = None
    while True:
        began = time.monotonic()
        job.write(folder)
        fault = next((f for f in sorted(job.faults, key=lambda f: f.iteration) if f.kind == "rank dies"), None)
        with held_port() as port:
            ranks = _Ranks(job, folder, port)
            try:
                ready = ranks.wait_ready(deadline, progress)
                if died is not None:
                    restarts.append(replace(died, launch_seconds=time.monotonic() - began))
                gone = ranks.wait(deadline, progress, fault)
            finally:
                ranks.end()
        if gone is None or fault is None:
            break
        path = folder / CHECKPOINT
        resumed = json.loads(path.read_text())["iteration"] + 1 if path.exists() else 1
        died = Restart(fault, gone, ranks.told(), resumed, 0.0)
        job = job.after(fault)
    lines = [_read(folder, rank) for rank in range(job.ranks)]
    if restarts:  # the first launch was on a machine that had nothing else to load
        ready = restarts[0].launch_seconds
    return Lines([iterations for iterations, _ in lines], [held for _, held in lines], ready, tuple(restarts))


class _Ranks:
    """The processes of one launch."""

    def __init__(self, job: Job, folder: Path, port: int):
        self._job, self._folder = job, folder
        self._lines_before = self._lines(0)
        self._heard = [self._size(rank) for rank in range(job.ranks)]
        if "forkserver" not in multiprocessing.get_all_start_methods():
            raise RehearsalError("ranks are forked from one process, which this system can't")
        context: ForkServerContext = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
        self._processes = [
            context.Process(target=_rank, args=(str(folder), rank, port), name=f"rank {rank}", daemon=True)
            for rank in range(job.ranks)
        ]
        self._began = time.monotonic()
        before = dict(os.environ)
        os.environ |= _ENVIRONMENT  # for the server, from which ranks are forked
        try:
            for process in self._processes:
                process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def wait_ready(self, deadline: float, progress: Callable[[str], None]) -> float:
        """Until all ranks can train; seconds since the start of the first."""
        while self._lines(0) <= self._lines_before:
            self._look(deadline, None)
            progress(f"starting {self._job.ranks} ranks")
            time.sleep(0.2)
        return time.monotonic() - self._began

    def wait(self, deadline: float, progress: Callable[[str], None], fault: Fault | None) -> float | None:
        """Until all ranks have ended (None), or all have left after the ``fault``: seconds that took."""
        died = None
        while any(p.exitcode is None for p in self._processes):
            if died is None and fault is not None and self._processes[fault.who].exitcode is not None:
                died = time.monotonic()
                deadline = min(deadline, died + LEAVING_SECONDS)
            self._look(deadline, fault)
            done = self._lines(0) - self._lines_before - 1
            progress(f"{self._job.stages} x {self._job.replicas} ranks: {done} iterations" if died is None else
                     f"rank {fault.who if fault else 0} has died; the others leave")  # fmt: skip
            time.sleep(0.2)
        self._look(deadline, fault)
        return None if died is None else time.monotonic() - died

    def told(self) -> int:
        """How many ranks have said where they stood."""
        said = 0
        for rank, before in enumerate(self._heard):
            with (self._folder / f"rank{rank}.log").open("rb") as log:
                log.seek(before)
                said += bool(_WORDS.search(log.read().decode(errors="replace")))
        return said

    def end(self) -> None:
        """Of those that are left."""
        for process in self._processes:
            if process.exitcode is None:
                process.kill()
        for process in self._processes:
            process.join(10.0)

    def _look(self, deadline: float, expected: Fault | None) -> None:
        """Raises RehearsalError where a rank has failed that wasn't to, or the time is over."""
        codes = [p.exitcode for p in self._processes]
        due = expected is not None and codes[expected.who] is not None
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed and not due:
            time.sleep(1.0)  # for the one that failed first to say so
            raise RehearsalError(f"rank {failed[0]} ended with status {codes[failed[0]]}: {self._last_words(failed)}")
        if time.monotonic() > deadline:
            left = [rank for rank, code in enumerate(codes) if code is None]
            raise RehearsalError(
                f"{len(left)} of {len(codes)} ranks haven't ended in time (the first is {left[0]}: "
                f"{self._last_words(left[:1])}); give --limit more seconds, or rehearse a smaller job"
            )

    def _last_words(self, ranks: list[int]) -> str:
        for rank in ranks:
            lines = (self._folder / f"rank{rank}.log").read_text(errors="replace").splitlines()
            told = [line for line in lines if re.match(r"\w*(?:Error|Exception)\b|\[dip\] stopped at|dip: ", line)]
            if told:
                return told[-1]
        return "it said nothing"

    def _size(self, rank: int) -> int:
        path = self._folder / f"rank{rank}.log"
        return path.stat().st_size if path.exists() else 0

    def _lines(self, rank: int) -> int:
        path = self._folder / f"rank{rank}.jsonl"
        return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def _rank(folder: str, rank: int, port: int) -> None:
    """In a fork of the server, which has loaded it."""
    from .rank import main

    main(folder, rank, port)


def _read(folder: Path, rank: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A rank's iterations, each the last time it ran, and what it held at its end."""
    lines = [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text(encoding="utf-8").splitlines()]
    iterations = {line["iteration"]: line for line in lines if "iteration" in line}
    return [iterations[i] for i in sorted(iterations)], lines[-1]
