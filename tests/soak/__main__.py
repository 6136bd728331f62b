"""Run a soak: Megatron's own schedule undisturbed, then DIP with faults; print what was seen and what was wrong."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path

import click
from rich.console import Console

from dip_megatron.report.tables import table
from examples.llava_digits.runs import RANKS, SCRIPT, Run, RunFailed, Start, started, train, training_flags
from tests.soak.checks import faults, growth, quarters, read_log

# Smaller than the quickstart, and learning so slowly that differences in the last bits stay there.
TINY = shlex.split(
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --vision-num-layers 2 --vision-hidden-size 32 "
    "--seq-length 96 --max-position-embeddings 96 --global-batch-size 4 --num-workers 0 --eval-iters 1 "
    "--lr 1e-5 --min-lr 1e-5 --lr-decay-style constant --lr-warmup-iters 0"
)


def soak(iterations: int, every: int, out: Path, console: Console, start: Start = started) -> list[str]:
    """Both runs below ``out``, whose ranks ``start`` starts; everything that went wrong. Raises RunFailed when a run
    ends early or falls silent."""
    out.mkdir(parents=True, exist_ok=True)
    flags = [*training_flags(iterations), *TINY]
    os.environ["SOAK_DIARY"] = str(out)
    os.environ["SOAK_SAMPLES"] = str(4 * iterations)
    command = [sys.executable, "-m", "tests.soak.trainer", str(SCRIPT), *flags]
    logs, took = {}, {}
    for name, distance, more in (("undisturbed", 0, []), ("disturbed", every, ["--dip-schedule", "dynamic"])):
        os.environ["SOAK_EVERY"] = str(distance)
        began = time.monotonic()
        train(name, [*command, *more], out, _say(console, name, iterations), start=start)
        took[name] = time.monotonic() - began
        logs[name] = read_log((out / f"{name}.rank{RANKS - 1}.log").read_text(errors="replace"))
    diaries = [
        [json.loads(line) for line in (out / f"diary.rank{rank}.jsonl").read_text().splitlines()]
        for rank in range(RANKS)
    ]
    console.print(_table(diaries, took))
    return faults(logs["disturbed"], logs["undisturbed"], diaries, iterations)


def _say(console: Console, name: str, iterations: int):
    def say(iteration: int, run: Run) -> None:
        if iteration % max(iterations // 10, 1) == 0:
            console.print(
                f"{name}: iteration {iteration} of {iterations}, {run.seconds[iteration]:.3f} s", highlight=False
            )

    return say


def _table(diaries: list[list[dict]], took: dict[str, float]):
    rows = []
    columns = [f"rank {rank}" for rank in range(len(diaries))]
    for who in ("trainer", "planner"):
        for label, at in (("second quarter", 0), ("last quarter", 1)):
            values = [growth(diary, who)[at] / 1e6 for diary in diaries]
            rows.append((f"MB of the {who}, {label}", dict(zip(columns, values, strict=True))))
    stalls = [[float(line["stall_seconds"]) for line in diary] for diary in diaries]
    for label, at in (("second quarter", 0), ("last quarter", 1)):
        rows.append(
            (f"s waited for a plan, {label}", {c: quarters(s)[at] for c, s in zip(columns, stalls, strict=True)})
        )
    rows.append(("s waited for a plan, most", {c: max(s) for c, s in zip(columns, stalls, strict=True)}))
    for key in ("fallbacks", "late_plans", "worker_deaths"):
        rows.append((key.replace("_", " "), {c: diary[-1][key] for c, diary in zip(columns, diaries, strict=True)}))
    title = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items())
    return table(f"Soak: {title}", ("median", *columns), rows)


@click.command()
@click.option("--iterations", default=2000, show_default=True, type=click.IntRange(min=10), help="per run")
@click.option("--every", default=40, show_default=True, type=click.IntRange(min=2), help="iterations between faults")
@click.option("--out", default=Path("out/soak"), show_default=True, type=click.Path(path_type=Path))
def main(iterations: int, every: int, out: Path) -> None:
    """Train tiny iterations on drifting data while planner workers fail, and compare with Megatron's own schedule."""
    try:
        found = soak(iterations, every, out, Console())
    except RunFailed as error:
        raise click.ClickException(str(error)) from error
    for fault in found:
        click.echo(f"soak: {fault}", err=True)
    if found:
        raise SystemExit(1)
    click.echo("soak: flat memory, no longer stalls, Megatron's losses and gradient norms")


if __name__ == "__main__":
    main()
