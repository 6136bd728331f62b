"""Starts ranks; ``python -m benchmarks.shared.ranks [OPTIONS] -- COMMAND`` lets them share one GPU under MPS."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn, TextIO

import click

from benchmarks.gpu.mps import MpsError, divided_gpu
from dip_megatron.ports import held_port

ROOT = Path(__file__).resolve().parents[2]


def worker_command(module: str, setting: Path) -> list[str]:
    """The command of each rank of a benchmark whose ``module`` has a function ``work(worker, setting)``; see
    :mod:`benchmarks.shared.worker`. ``setting`` is a JSON file with a ``seed``."""
    return [sys.executable, "-m", "benchmarks.shared.worker", module, str(setting)]


def run_ranks(
    command: Sequence[str], count: int, out: Path, limit: float, environment: dict[str, str] | None = None
) -> int:
    """Run ``command`` as ``count`` ranks of one process group; 0 if all ended well, else 1 after ending them all.

    What ranks write goes to ``out/rank*.log``, what the first one prints to stdout; of a failure the ends of all logs
    are printed. After ``limit`` seconds everything is stopped.
    """
    logs = [out / f"rank{rank}.log" for rank in range(count)]
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        shared = surroundings(count, stack.enter_context(held_port()), environment)
        for rank, path_of_log in enumerate(logs):
            log = stack.enter_context(path_of_log.open("w"))
            processes.append(start(command, {**shared, "RANK": str(rank)}, None if rank == 0 else log, log))
        failed = _await(processes, limit)
    if failed:
        for rank, path_of_log in enumerate(logs):
            lines = [line for line in path_of_log.read_text(errors="replace").splitlines() if line.strip()]
            print(f"--- rank {rank} ({processes[rank].returncode})", *lines[-25:], sep="\n", flush=True)
    return int(failed)


def surroundings(count: int, port: int, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What ranks find in their environment, but for their numbers; the first of them listens on ``port``."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": "0",  # all of them on the first GPU
        # A queue for each stream: copies must not stand behind kernels.
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": path,
        **(environment or {}),
    }


def start(
    command: Sequence[str], environment: Mapping[str, str], out: TextIO | None, error: TextIO
) -> subprocess.Popen[bytes]:
    """One rank; ``out`` None: it prints where this process does."""
    return subprocess.Popen(list(command), env=environment, stdout=out, stderr=error)


def run_as_rank(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` as one of the ranks, and end the process without waiting for anyone."""
    try:
        main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # peers may wait for this process inside a collective: its end is what tells them
    os._exit(0)  # gloo's and the transport's threads are not waited for


def _await(processes: Sequence[subprocess.Popen[bytes]], limit: float) -> bool:
    """Wait for all; whether one failed or time ran out. None is left running."""
    deadline, failed = time.monotonic() + limit, False
    while not failed and any(p.poll() is None for p in processes):
        time.sleep(0.2)
        if any(p.poll() for p in processes):
            failed = True
            time.sleep(5.0)  # let the others say what they saw
        elif time.monotonic() > deadline:
            print(f"stopped after {limit:.0f} s", flush=True)
            failed = True
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
    return failed or any(p.returncode for p in processes)


def has_gpu() -> bool:
    """Asked in a process of its own: this one must not hold a context on the GPU that is to be divided."""
    code = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--ranks", type=click.IntRange(min=1), help="Start so many ranks (default: the command once, as it is).")
@click.option("--percent", type=float, default=12.0, show_default=True, help="Share of the GPU's SMs per process.")
@click.option("--card-gb", type=float, default=18.5, show_default=True, help="A process's memory limit.")
@click.option("--limit", type=float, default=300.0, show_default=True, help="Seconds after which all is stopped.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/ranks"), show_default=True)
@click.argument("command", nargs=-1, required=True)
def main(ranks: int | None, percent: float, card_gb: float, limit: float, out: Path, command: tuple[str, ...]) -> None:
    """Run COMMAND with the GPU divided among the processes it starts."""
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            shared = stack.enter_context(divided_gpu(percent, card_gb)) if has_gpu() else {}
        except MpsError as error:
            raise click.ClickException(str(error)) from error
        if ranks is not None:
            sys.exit(run_ranks(command, ranks, out, limit, shared))
        environment = {**os.environ, **shared, "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
        try:
            sys.exit(subprocess.run(list(command), env=environment, timeout=limit).returncode)
        except subprocess.TimeoutExpired:
            sys.exit(f"stopped after {limit:.0f} s")


if __name__ == "__main__":
    main()
