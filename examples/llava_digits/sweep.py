"""Find the best split of the quickstart's language model for Megatron's own schedules: train a little with each.

``python -m examples.llava_digits.sweep`` prints the median time of an iteration for every layout, the fastest first.
Megatron's ``LLaVAModel`` holds its ViT whole and builds it with the first stage, so only the layers of the language
model can be spread. One stage a rank is 1F1B, more are Megatron's interleaved schedule with so many virtual stages.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

import click
from rich.console import Console

from dip_megatron.report.tables import seconds, table

from .comparison import WARM_UP
from .quickstart import ARGUMENTS, Contender, megatron, train_all
from .runs import RANKS, RunFailed, training_flags

# All splits of two layers into two stages that leave the first rank at most one; of those into four, the ones that a
# simulation of Megatron's order put first, and of those into six what follows the best of these.
LAYOUTS = (
    "E|ttL", "Et|tL",
    "E|||ttL", "E|t||tL", "E||t|tL", "E|tt||L", "E|t|t|L",
    "E|||||ttL",
)  # fmt: skip


def contender(layout: str) -> Contender:
    """The run of a layout, named by it."""
    return megatron(layout, "layout-" + layout.replace("|", "."), layout)


@click.command()
@click.option("--iterations", default=15, show_default=True, type=click.IntRange(min=WARM_UP + 1), help="per layout")
@click.option("--out", default=Path("out/sweep"), show_default=True, type=click.Path(path_type=Path), help="for logs")
@click.argument("layouts", nargs=-1)
def main(iterations: int, out: Path, layouts: tuple[str, ...]) -> None:
    """Median time of an iteration for each of LAYOUTS (default: a list of splits), the fastest first."""
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [contender(layout) for layout in layouts or LAYOUTS]
    flags = [*training_flags(iterations, ARGUMENTS), "--eval-iters", "1"]
    try:
        runs = train_all(chosen, iterations, flags, out, console)
    except RunFailed as error:
        raise click.ClickException(str(error)) from error
    times = {
        layout: statistics.median(value for i, value in run.seconds.items() if i > WARM_UP)
        for layout, run in runs.items()
    }
    rows: list[tuple[str, Mapping[str, str | float | int | None]]] = [
        (layout, {"virtual stages": (layout.count("|") + 1) // RANKS, "an iteration": seconds(times[layout])})
        for layout in sorted(times, key=times.__getitem__)
    ]
    console.print(table("Megatron's schedules", ("layout", "virtual stages", "an iteration"), rows))


if __name__ == "__main__":
    main()
