"""Python processes forked from one that has imported Megatron already: importing it takes longer than most tests."""

from __future__ import annotations

import atexit
import faulthandler
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from dip_megatron.ports import held_port
from examples.llava_digits.runs import end, environment
from tests.patience import LONG

ROOT = Path(__file__).resolve().parents[1]
_preloaded = ["tests.preloaded"]


def preload(module: str) -> None:
    """Have the server import ``module`` instead of ``tests.preloaded``. Call it before the first process starts."""
    _preloaded[:] = [module]


def context() -> ForkServerContext:
    """Where processes come from; the server starts at the first of them."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_preloaded)
    return found


def serve() -> None:
    """Start the server where another would be started by what is tested: this process has one for good."""
    context()
    multiprocessing.forkserver.ensure_running()


class Forked:
    """A process with the methods of subprocess.Popen that matter.

    ``enter``, if given, is called there first, while the process has one thread.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], log: Path, enter: Callable[[], None] | None = None
    ):
        self._process: Any = context().Process(target=_run, args=(list(command[1:]), dict(env), str(log), enter))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("forked", timeout)
        return self._process.exitcode


@contextmanager
def forked(command: Sequence[str], logs: Sequence[Path]) -> Iterator[list[Forked]]:
    """As ``runs.started``, for commands ``[python, (-m MODULE | -c PROGRAM | SCRIPT), ARGUMENTS...]``."""
    processes: list[Forked] = []
    try:
        with held_port() as port:
            for log, place in zip(logs, environment(len(logs), port), strict=True):
                log.write_bytes(b"")
                processes.append(Forked(command, place, log))
            yield processes
    finally:
        end(processes)


def alone(program: str, log: Path, **variables: str) -> str:
    """Run a program in a process of its own, on the CPU platform with Megatron loaded; all that it writes."""
    log.write_bytes(b"")
    process = Forked([sys.executable, "-c", textwrap.dedent(program)], {**os.environ, **variables}, log)
    try:
        code = process.wait(timeout=LONG)
    finally:
        end([process])
    text = log.read_text()
    assert code == 0, text
    return text


@dataclass(frozen=True)
class Done:
    """A command that has ended: its status, and what it printed on either stream."""

    status: int
    out: str
    err: str


def done(arguments: Sequence[str], folder: Path, **variables: str) -> Done:
    """Run ``[python, *arguments]`` in ``folder``, to its end, as a process of its own."""
    out, err = folder / "stdout", folder / "stderr"
    err.write_bytes(b"")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    process = Forked([sys.executable, *arguments], environment, err, functools.partial(_enter, str(folder), str(out)))
    try:
        return Done(process.wait(timeout=LONG), out.read_text(), err.read_text())
    finally:
        end([process])


def print_to(path: str) -> None:
    """Have this process's standard output written to a file of its own."""
    with open(path, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)


def _enter(folder: str, out: str) -> None:
    print_to(out)
    os.chdir(folder)


def _run(command: list[str], env: dict[str, str], log: str, enter: Callable[[], None] | None) -> None:
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    if enter is not None:
        enter()
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    if env.get("PYTHONUNBUFFERED"):  # as a new Python takes it: some ranks end without flushing
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    multiprocessing.set_start_method("fork", force=True)  # as in a process that wasn't forked; loaders of data use it
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        elif command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(command[1], "<program>", "exec"), vars(sys.modules["__main__"]))
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).resolve().parent))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
