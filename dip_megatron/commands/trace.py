"""``dip trace``: a plan as a Perfetto trace, or where the time of a run's iterations went."""

from __future__ import annotations

from pathlib import Path

import click

from ..report.trace import write_trace
from .common import OUT_FILE, fail, json_option, one_line_errors, print_json, progress_bar
from .drawing import planned_spans


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=OUT_FILE, default=Path("trace.json"), show_default=True)
@click.option("--number", type=click.IntRange(min=1), default=1, show_default=True, help="Which plan of the file.")
@click.option("--breakdown", is_flag=True,
              help="PLAN is the folder of a run's --dip-trace-dir: say where its iterations' time went.")  # fmt: skip
@json_option
@one_line_errors
def trace(plan: Path, out: Path, number: int, breakdown: bool, as_json: bool) -> None:
    """Write one plan of the file PLAN as a trace for https://ui.perfetto.dev (or chrome://tracing)."""
    if breakdown:
        _break_down(plan, as_json)
        return
    with progress_bar(f"tracing {plan.name}", None, as_json):
        _, spans = planned_spans(plan, number)
        write_trace(out, spans, [])
    if as_json:
        print_json({"out": str(out), "operations": len(spans)})
    else:
        click.echo(f"{len(spans)} operations written to {out}; open it at https://ui.perfetto.dev")


def _break_down(path: Path, as_json: bool) -> None:
    from rich.console import Console

    from ..report.breakdown import breakdown_table, headline, summary
    from ..report.observed import json_lines
    from ..report.recorder import LINES

    if path.is_dir() and not (path / LINES).is_file():
        fail(f"{path}: no {LINES} in it; give the folder of a run's --dip-trace-dir")
    path = path / LINES if path.is_dir() else path
    with progress_bar(f"reading {path}", None, as_json):
        lines = json_lines(path)
        try:
            found = summary(lines)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if as_json:
        print_json(found)
        return
    console = Console(width=None if Console().is_terminal else 160)
    console.print(breakdown_table(found))
    console.print(headline(found), soft_wrap=True, highlight=False)
