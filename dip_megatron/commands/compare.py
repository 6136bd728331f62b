"""``dip compare``: all schedules side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..describe.model import Partition
from ..planner.facade import DoesNotFitError, Effort, Setting, make_planner, searched_partition
from ..planner.replicated import Balance, replicated
from ..report.schedules import (
    Entry,
    compare_table,
    entry,
    mean_entries,
    missing_entry,
    replicas_entry,
    replicas_table,
)  # fmt: skip
from ..schedulers.common import BaselineError
from ..schedulers.registry import UnknownScheduleError, find_schedule, schedule_names
from .common import (
    OUT_FILE,
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
@click.option("--replicas", type=click.IntRange(min=2),
              help="Compare as many data-parallel replicas, each with batches of its own: a step takes as long as the "
              "slowest. Without --iterations, one.")  # fmt: skip
@click.option("--balance", type=click.Choice(["off", "swap", "free"]),
              help="How replicas exchange microbatches before they are planned (swap, with --replicas).")  # fmt: skip
@search_options
@click.option("--out", "-o", type=OUT_FILE, help="Save the comparison as JSON.")
@json_option
@one_line_errors
def compare(
    schedules: str | None, replicas: int | None, balance: Balance | None, budget: float, workers: int | None,
    seed: int, partition: Path | None, partition_budget: float, out: Path | None, as_json: bool, **values: Any,
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
    if balance is not None and replicas is None:
        fail("--balance: one replica has nobody to exchange with; give --replicas, too")
    setting = setting_of(values, replicas or 1)
    given = partition_of(partition, setting)
    effort = Effort(budget, worker_count(workers), seed)
    names = [e.name for e in entries]
    with progress_bar(f"comparing on {setting.model.name}", len(names) + 1, as_json) as advance:
        searched = None
        if given is None and any(e.mixed is None and e.partition != "paper" for e in entries):
            advance("choosing a partition")
            searched = searched_partition(setting, partition_budget)
        columns: dict[str, list[Entry]] = {}
        many: dict[str, Entry | None] = {}
        for name in names:
            advance(name)
            if replicas is None:
                columns[name] = _column(name, setting, effort, given, searched)
            else:
                many[name] = _replicas(name, setting, effort, replicas, balance or "swap", given, searched)
    data: dict[str, Any]
    if replicas is None:
        iterations = [{name: columns[name][i] for name in names} for i in range(len(setting.batches))]
        mean = mean_entries(iterations)
        data = {"iterations": iterations, "mean": mean}
        text = compare_table(mean, next((e.name for e in entries if e.searches), entries[0].name))
    else:
        data = {"replicas": replicas, "balance": balance or "swap", "mean": many}
        text = replicas_table(many)
    if out is not None:
        out.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(data)
    else:
        click.echo(text)
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


def _replicas(
    name: str, setting: Setting, effort: Effort, replicas: int, balance: Balance, given: Partition | None,
    searched: Partition | None,
) -> Entry | None:  # fmt: skip
    """One schedule's replicas; None where it can't run, or some don't fit."""
    try:
        return replicas_entry(replicated(name, setting, effort, replicas, balance, given, searched=searched))
    except (BaselineError, DoesNotFitError):
        return None
