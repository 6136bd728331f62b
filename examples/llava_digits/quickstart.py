"""Train one small LLaVA on the same batches under Megatron's own schedules and under DIP, and compare.

``scripts/quickstart`` installs what this needs and runs it. Two CPU ranks, less than five minutes, no GPU.

The model of ``quickstart.args`` has the shape of VLM-S (a ViT of 5B parameters, Llama3 8B) in small: a ViT deeper than
the language model, whose patches become few tokens, so that most of the work is in the ViT. FLOPs of the encoder over
those of the language model, real models on ``vlm-mix`` (``python -m examples.llava_digits.ratios``)::

    quickstart 5.40    VLM-S 5.51    VLM-L 2.81    VLM-M 1.31    Qwen2.5-VL-7B 0.26

Megatron keeps the ViT whole on its first stage and spreads the language model's layers over stages and virtual stages.
Its two columns are the fastest splits that ``python -m examples.llava_digits.sweep`` finds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dip_megatron.report.tables import seconds

from .comparison import DIP, compare, gains, planner_lines
from .runs import SCRIPT, Run, RunFailed, train, training_flags

ARGUMENTS = "quickstart.args"
ITERATIONS = 60
# Megatron's layouts: stages from rank to rank, E the embedding and with it the ViT, t a layer of the language model, L
# its loss. More than two stages are virtual ones. The best of those that sweep.py lists.
ONE_F_ONE_B = "E|ttL"
INTERLEAVED = "E|||ttL"


@dataclass(frozen=True)
class Contender:
    """A schedule to train under: its column, the name of its logs, and the start of its command."""

    title: str
    name: str
    launcher: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def command(self, flags: Sequence[str]) -> list[str]:
        """What a rank runs."""
        return [sys.executable, *self.launcher, str(SCRIPT), *flags, *self.flags]


def megatron(title: str, name: str, layout: str) -> Contender:
    """Megatron's own schedule for a layout."""
    return Contender(title, name, flags=("--pipeline-model-parallel-layout", layout))


def contenders(folder: Path, dip_config: Path | None) -> list[Contender]:
    """All of them, DIP last; ``folder`` is for its traces."""
    flags = ["--dip-schedule", "dynamic", "--dip-trace-dir", str(folder)]
    if dip_config is not None:
        flags += ["--dip-config", str(dip_config)]
    return [
        megatron("Megatron 1F1B", "1f1b", ONE_F_ONE_B),
        megatron("Megatron interleaved", "interleaved", INTERLEAVED),
        Contender(DIP, "dip", ("-m", "dip_megatron.cli", "run"), tuple(flags)),
    ]


def train_all(
    chosen: Sequence[Contender], iterations: int, flags: Sequence[str], out: Path, console: Console
) -> dict[str, Run]:
    """Their runs by title, one after the other, with a line of progress each. Raises RunFailed."""
    columns = (
        TextColumn("{task.description:20}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )  # fmt: skip
    runs: dict[str, Run] = {}
    with Progress(*columns, console=console) as progress:
        for contender in chosen:
            task = progress.add_task(contender.title, total=iterations, state="starting")

            def show(iteration: int, run: Run, task: Any = task) -> None:
                state = f"loss {run.losses[iteration]:.3f}, {seconds(run.seconds[iteration])} an iteration"
                progress.update(task, completed=iteration, state=state)

            runs[contender.title] = train(contender.name, contender.command(flags), out, show)
    return runs


@click.command()
@click.option("--iterations", default=ITERATIONS, show_default=True, type=click.IntRange(min=10), help="per run")
@click.option(
    "--out",
    default=Path("out/quickstart"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="folder of results",
)
@click.option("--dip-config", type=click.Path(path_type=Path, exists=True), help="YAML file for the DIP run")
@click.option("--only", type=click.Choice(["1f1b", "interleaved", "dip"]), help="one of the runs, no comparison")
def main(iterations: int, out: Path, dip_config: Path | None, only: str | None) -> None:
    """Train a small LLaVA to read digits under Megatron's best schedules and under DIP."""
    console = Console()
    folder = out / "dip"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--out {out}: {error.strerror}; name a folder that can be written") from error
    for stale in ("iterations.jsonl", "trace.json", "timeline.png"):
        (folder / stale).unlink(missing_ok=True)
    chosen = [c for c in contenders(folder, dip_config) if only in (None, c.name)]
    try:
        runs = train_all(chosen, iterations, training_flags(iterations, ARGUMENTS), out, console)
        if only:
            (run,) = runs.values()
            read = "–" if run.accuracy is None else f"{run.accuracy:.1%}"
            console.print(f"loss {run.losses[max(run.losses)]:.6f}, digits read on held-out images {read}")
            return
        console.print(compare(runs, planner_lines(folder)))
    except RunFailed as error:
        raise click.ClickException(str(error)) from error
    console.print(
        "Times are medians. Megatron's LLaVA keeps its ViT on the first stage; the fastest\n"
        f"splits of its language model are {ONE_F_ONE_B} and, interleaved, {INTERLEAVED}\n"
        "(python -m examples.llava_digits.sweep).",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"DIP trains {min(gains(runs).values()):.2f} times as fast as the best of Megatron's.", style="bold")
    console.print("Its last iteration, planned beside measured:")
    console.print(f"  trace    {folder / 'trace.json'}  (open it at https://ui.perfetto.dev)", soft_wrap=True)
    console.print(f"  picture  {folder / 'timeline.png'}", soft_wrap=True)


if __name__ == "__main__":
    main()
