"""``dip plot``: a plan as a picture."""

from __future__ import annotations

from pathlib import Path

import click

from .common import OUT_FILE, fail, json_option, one_line_errors, print_json, progress_bar
from .drawing import measured_replicas, planned_spans


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=OUT_FILE, default=Path("plan.svg"), show_default=True,
              help=".svg, .png or .pdf")  # fmt: skip
@click.option("--number", type=click.IntRange(min=1), default=1, show_default=True, help="Which plan of the file.")
@json_option
@one_line_errors
def plot(plan: Path, out: Path, number: int, as_json: bool) -> None:
    """Draw one plan of the file PLAN: a row per rank, time to the right.

    If PLAN is the folder of a run's --dip-trace-dir, draw its last iteration instead, all data-parallel replicas below
    one another.
    """
    with progress_bar(f"drawing {plan.name}", None, as_json):
        try:
            from ..report.figure import plot_replicas, plot_timeline
        except ImportError:
            fail("dip plot needs matplotlib: pip install 'dip_megatron[viz]'")
        if plan.is_dir():
            replicas = measured_replicas(plan)
            plot_replicas(out, replicas, title=f"{plan.name}: {len(replicas)} replicas")
            count = sum(map(len, replicas.values()))
        else:
            found, spans = planned_spans(plan, number)
            plot_timeline(out, spans, [], lower_bound=found.predicted.lower_bound, title=found.name)
            count = len(spans)
    if as_json:
        print_json({"out": str(out), "operations": count})
    else:
        click.echo(f"{count} operations drawn to {out}")
