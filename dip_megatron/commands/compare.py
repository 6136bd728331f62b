"""``dip compare``: all schedules side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..describe.model import Partition
from ..planner.facade import DoesNotFitError, Effort, Setting, make_planner, searched_partition
from ..report.schedules import Entry, compare_table, entry, mean_entries, missing_entry
from ..schedulers import BaselineError, UnknownScheduleError, find_schedule, schedule_names
from .common import (
    fail,
    json_option,
    one_line_errors,
    partition_of,
    print_json,
    progress_bar,
    search_options,
    setting_of,
    setting_options,
    worker_count,
)  # fmt: skip


@click.command()
@setting_options
@click.option("--schedules", help=f"Comma-separated (default: all): {', '.join(schedule_names())}.")
@search_options
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Save the comparison as JSON.")
@json_option
@one_line_errors
def compare(
    schedules: str | None, budget: float, workers: int | None, seed: int, partition: Path | None,
    partition_budget: float, out: Path | None, as_json: bool, **values: Any,
) -> None:  # fmt: skip
    """All schedules side by side on the same batches, with bounds, bubbles, memory and recompute.

    Static baselines are tuned on the very batches they are measured on, with the least recompute that fits: they are as
    good as a careful engineer could make them.
    """
    names = [n.strip() for n in schedules.split(",")] if schedules else list(schedule_names())
    try:
        entries = [find_schedule(name) for name in names]
    except UnknownScheduleError as error:
        fail(f"--schedules: {error}")
    setting = setting_of(values)
    given = partition_of(partition, setting)
    effort = Effort(budget, worker_count(workers), seed)
    names = [e.name for e in entries]
    with progress_bar(f"comparing on {setting.model.name}", len(names) + 1, as_json) as advance:
        searched = None
        if given is None and any(e.mixed is None and e.partition != "paper" for e in entries):
            advance("choosing a partition")
            searched = searched_partition(setting, partition_budget)
        columns = {}
        for name in names:
            advance(name)
            columns[name] = _column(name, setting, effort, given, searched)
    iterations = [{name: columns[name][i] for name in names} for i in range(len(setting.batches))]
    mean = mean_entries(iterations)
    data = {"iterations": iterations, "mean": mean}
    if out is not None:
        out.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(data)
    else:
        click.echo(compare_table(mean, next((e.name for e in entries if e.searches), entries[0].name)))
        if out is not None:
            click.echo(f"saved to {out}")


def _column(
    name: str, setting: Setting, effort: Effort, given: Partition | None, searched: Partition | None
) -> list[Entry]:
    """One schedule's entry for every batch."""
    try:
        planner = make_planner(name, setting, effort, given, searched=searched)
    except BaselineError:
        return [missing_entry() for _ in setting.batches]
    column = []
    for batch in setting.batches:
        try:
            column.append(entry(planner(batch.microbatches)))
        except (BaselineError, DoesNotFitError):
            column.append(missing_entry())
    return column
