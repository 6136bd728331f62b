"""``dip report``: a run or a plan as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from ..report.observed import observed
from .common import OUT_FILE, json_option, one_line_errors, print_json, progress_bar


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.option("--out", "-o", type=OUT_FILE, default=Path("report.html"), show_default=True)
@click.option("--number", type=click.IntRange(min=1), default=1, show_default=True,
              help="Which plan of a plan file has its timeline shown.")  # fmt: skip
@json_option
@one_line_errors
def report(source: Path, out: Path, number: int, as_json: bool) -> None:
    """Write one HTML file about SOURCE, a plan file or the folder of a run's --dip-trace-dir; it needs no network.

    It shows the timeline (the last iteration's, planned and measured), idle time by cause, memory, all iterations, and
    settings and versions of the run.
    """
    with progress_bar(f"reading {source}", None, as_json) as advance:
        found = observed(source, number, lambda: advance(None))
        advance("drawing")
        from ..report.html import facts, write_report

        write_report(out, found)
    if as_json:
        print_json({"out": str(out), "bytes": out.stat().st_size, "facts": dict(facts(found))})
    else:
        click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
