#!/usr/bin/env python3
"""Take the README's picture from the report of a run: ``python -m scripts.make_picture out/quickstart/dip``. Chromium
must be installed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from dip_megatron.report.html import write_report
from dip_megatron.report.observed import observed
from tests.browser import opened

ROOT = Path(__file__).resolve().parent.parent


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "docs/images/timeline.png", show_default=True)
def main(folder: Path, out: Path) -> None:
    """Draw one iteration of FOLDER, planned and measured, as `dip report` shows it."""
    with tempfile.TemporaryDirectory() as scratch:
        page_file = Path(scratch) / "report.html"
        write_report(page_file, observed(folder))
        with opened(page_file, width=1200) as (page, complaints):
            page.locator("section", has=page.locator("#figure-timeline")).screenshot(path=str(out))
    if complaints:
        raise click.ClickException("; ".join(complaints))


if __name__ == "__main__":
    main()
