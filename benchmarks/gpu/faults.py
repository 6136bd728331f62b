"""A rank that dies within an iteration, on ranks that share one GPU: all others say so and leave.

    python -m benchmarks.gpu.faults [--ranks N] [--out FOLDER]

Trains the tiny model of ``benchmarks.gpu.loops experts`` under DIP and kills its last rank (SIGKILL) as it reads a
microbatch of the fourth iteration. Exit code 0 if every other rank ended by itself within ``--patience`` seconds, with
a status that isn't 0 and a line that tells of it. Without a GPU it runs on CPU processes.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import click

from benchmarks.shared.ranks import has_gpu, start, surroundings
from dip_megatron.ports import held_port

from .loops import CASES, command_of
from .mps import MpsError, divided_gpu

ITERATION = 4


@click.command()
@click.option("--ranks", type=click.IntRange(min=2), default=4, show_default=True)
@click.option("--patience", type=float, default=60.0, show_default=True, help="Seconds for the others to leave.")
@click.option("--limit", type=float, default=180.0, show_default=True, help="Seconds until the rank must have died.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/gpu_faults"), show_default=True)
def main(ranks: int, patience: float, limit: float, out: Path) -> None:
    """Kill a rank and see how the others end."""
    out.mkdir(parents=True, exist_ok=True)
    command = command_of(CASES["experts"], "tiny", 100, ranks, "--dip-schedule", "dynamic")
    with ExitStack() as stack:
        try:
            shared = stack.enter_context(divided_gpu(12.0, 10.0)) if has_gpu() else {}
        except MpsError as error:
            raise click.ClickException(str(error)) from error
        environment = {**surroundings(ranks, stack.enter_context(held_port()), shared), "LAUNCH_KILL": str(ITERATION)}
        logs = [out / f"rank{rank}.log" for rank in range(ranks)]
        processes = []
        for rank, path in enumerate(logs):
            file = stack.enter_context(path.open("w"))
            processes.append(start(command, {**environment, "RANK": str(rank)}, file, file))
        began, died = time.monotonic(), 0.0
        left: dict[int, float] = {}
        while len(left) < ranks and time.monotonic() < (died + patience if died else began + limit):
            time.sleep(0.1)
            for rank, process in enumerate(processes):
                if rank not in left and process.poll() is not None:
                    left[rank] = time.monotonic()
            died = died or min(left.values(), default=0.0)
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    others = [r for r in left if r != ranks - 1]
    told = [r for r in others if processes[r].returncode and "[dip] stopped" in logs[r].read_text(errors="replace")]
    seconds = max((left[r] - died for r in others), default=float("nan"))
    found = {"others": len(others), "told": len(told), "seconds": round(seconds, 1)}
    (out / "results.json").write_text(json.dumps(found))
    print(f"{len(others)} of {ranks - 1} others left by themselves within {seconds:.1f} s, {len(told)} said why")
    for path in logs:
        print(f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-3:], sep="\n")
    sys.exit(0 if len(told) == ranks - 1 and processes[-1].returncode == -9 else 1)


if __name__ == "__main__":
    main()
