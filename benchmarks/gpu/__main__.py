"""scripts/bench gpu: all schedules train a vision-language model on one GPU that acts as a pipeline of four.

Starts NVIDIA's multi-process service, gives each of four ranks an equal share of the GPU, measures the model's layers,
plans every schedule with these costs, runs the plans on the same batches and weights, and prints a table. Writes
results.json, costs.json and a Perfetto trace (planned beside measured) per schedule to --out. Without a GPU it runs a
tiny model on CPU processes: a check of the benchmark, no measurement.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import click

from benchmarks.gpu.mps import MpsError, divided_gpu
from benchmarks.gpu.setting import SCHEDULES, Setting
from benchmarks.shared.ranks import has_gpu, run_ranks, worker_command
from dip_megatron.runtime.transport_choice import TransportKind

ROOT = Path(__file__).resolve().parents[2]


@click.command()
@click.option("--size", type=click.Choice(["auto", "full", "tiny"]), default="auto", show_default=True)
@click.option("--batches", type=click.IntRange(min=1), default=5, show_default=True, help="Different batches.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Timed passes over them.")
@click.option("--microbatches", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--workload", default="vlm-mix", show_default=True, help="Mix of the batches.")
@click.option("--schedules", default=",".join(SCHEDULES), show_default=True, help="Comma-separated.")
@click.option("--search", type=float, default=2.0, show_default=True, help="Seconds of search per plan.")
@click.option("--partition-search", type=float, default=15.0, show_default=True, help="Seconds to choose a partition.")
@click.option("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), show_default=True,
              help="Search threads.")  # fmt: skip
@click.option("--percent", type=float, default=12.0, show_default=True, help="Share of the GPU's SMs per rank.")
@click.option("--memory-gb", type=float, default=15.0, show_default=True, help="What plans may use per rank.")
@click.option("--card-gb", type=float, default=18.5, show_default=True, help="A rank's memory limit.")
@click.option("--transport", type=click.Choice(["ipc", "staging", "gloo"]), help="Default: by the devices.")
@click.option("--costs", type=click.Path(exists=True), help="Costs file of an earlier run, instead of measuring.")
@click.option("--optimizer/--no-optimizer", default=True, show_default=True, help="Adam after each timed iteration.")
@click.option("--mps/--no-mps", default=True, show_default=True, help="Divide the GPU; else ranks take turns.")
@click.option("--limit", type=float, default=540.0, show_default=True, help="Seconds after which all is stopped.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/bench_gpu"), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    size: str, batches: int, rounds: int, microbatches: int, workload: str, schedules: str, search: float,
    partition_search: float, workers: int, percent: float, memory_gb: float, card_gb: float,
    transport: TransportKind | None, costs: str | None, optimizer: bool, mps: bool, limit: float, out: Path, seed: int,
) -> None:  # fmt: skip
    """Measure schedules on one GPU that acts as four."""
    gpu = has_gpu()
    if size == "auto":
        size = "full" if gpu else "tiny"
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    unknown = set(schedules.split(",")) - set(SCHEDULES)
    if unknown:
        raise click.UsageError(f"unknown schedules {', '.join(sorted(unknown))}; there are {', '.join(SCHEDULES)}")
    setting = Setting(
        size=size, batches=batches, microbatches=microbatches, rounds=rounds, seed=seed, workload=workload,
        schedules=tuple(schedules.split(",")), search_seconds=search, partition_seconds=partition_search,
        search_workers=workers, memory_gb=memory_gb, transport=transport, optimizer=optimizer,
        costs=str(Path(costs).resolve()) if costs else None, out=str(out),
    )  # fmt: skip
    (out / "setting.json").write_text(json.dumps(setting.record(), indent=1))
    with ExitStack() as stack:
        shared: dict[str, str] = {}
        if gpu and mps:
            try:
                shared = stack.enter_context(divided_gpu(percent, card_gb))
            except MpsError as error:
                raise click.ClickException(str(error)) from error
        warming = _warm_up()
        command = worker_command("benchmarks.gpu.train", out / "setting.json")
        status = run_ranks(command, setting.ranks, out, limit, {**shared, "DIP_BENCH_WARMING": str(warming.pid)})
        if warming.poll() is None:
            warming.kill()
        warming.wait()
        sys.exit(status)


def _warm_up() -> subprocess.Popen[bytes]:
    """Compile the search's kernels beside the measuring; the planning rank then finds them in their cache."""
    code = "from dip_megatron.schedulers.dip.engine import warm_up; warm_up()"
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)


if __name__ == "__main__":
    main()
