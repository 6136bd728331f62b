"""``dip trace``: a plan as a Perfetto trace."""

from __future__ import annotations

from pathlib import Path

import click

from ..report.trace import write_trace
from .common import json_option, one_line_errors, print_json
from .drawing import planned_spans


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("trace.json"), show_default=True)
@click.option("--number", type=click.IntRange(min=1), default=1, show_default=True, help="Which plan of the file.")
@json_option
@one_line_errors
def trace(plan: Path, out: Path, number: int, as_json: bool) -> None:
    """Write one plan of the file PLAN as a trace for https://ui.perfetto.dev (or chrome://tracing)."""
    _, spans = planned_spans(plan, number)
    write_trace(out, spans, [])
    if as_json:
        print_json({"out": str(out), "operations": len(spans)})
    else:
        click.echo(f"{len(spans)} operations written to {out}; open it at https://ui.perfetto.dev")
