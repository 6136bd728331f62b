"""``dip plan``: plans for the batches of a workload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..core.action_csv import ActionCsvError, format_actions, parse_actions
from ..core.files import write_plans
from ..core.verify import verify
from ..planner.facade import Effort, make_planner
from ..report.schedules import entry, plan_table
from ..schedulers.entry import LeastRecompute
from ..schedulers.registry import find_schedule, schedule_names
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
@click.option("--schedule", default="dip", show_default=True, help=f"One of {', '.join(schedule_names())}.")
@search_options
@click.option("--evaluations", type=click.IntRange(min=1), help="Schedules tried an iteration, instead of a budget.")
@click.option("--deterministic", is_flag=True, help="Depend on --seed and --evaluations alone.")
@click.option("--out", "-o", type=OUT_FILE, help="Write the plans (JSON lines).")
@click.option(
    "--orders",
    type=click.Path(path_type=Path),
    help="Take the order from a CSV of actions, as torch.distributed.pipelining reads it, on the chunks of --schedule.",
)
@click.option(
    "--csv",
    "csv_out",
    type=OUT_FILE,
    help="Write the orders as such a CSV (NAME-1.csv, ... for further batches).",
)
@json_option
@one_line_errors
def plan(
    schedule: str, budget: float, workers: int | None, seed: int, partition: Path | None, partition_budget: float,
    evaluations: int | None, deterministic: bool, out: Path | None, orders: Path | None, csv_out: Path | None,
    as_json: bool, **values: Any,
) -> None:  # fmt: skip
    """Plan every batch of a workload, verify the plans, and write them to a file.

    A CSV of actions says orders of whole microbatches through one chain of stages; not durations, payloads or memory
    strategies (an order that is read gets the least recompute that fits).
    """
    if deterministic and evaluations is None:
        fail("--deterministic needs --evaluations: a time limit would not repeat")
    chosen = find_schedule(schedule)
    text = None if orders is None else orders.read_text(encoding="utf-8")
    setting = setting_of(values)
    effort = Effort(budget, worker_count(workers), seed, evaluations, deterministic)
    given = partition_of(partition, setting)
    found, plans, csvs = [], [], []
    with progress_bar(f"planning {setting.model.name}", None, as_json) as advance:
        planner = make_planner(
            chosen,
            setting,
            effort,
            given,
            partition_seconds=partition_budget,
            progress=lambda: advance(None),
            find=None if text is None else LeastRecompute(lambda problem: [parse_actions(text, problem.graph)]),
        )
        for number, batch in enumerate(setting.batches):
            try:
                planned = planner(batch.microbatches)
                if csv_out is not None:
                    csvs.append(format_actions(planned.graph, planned.schedule))
            except ActionCsvError as error:
                fail(f"iteration {number}: {orders or csv_out}: {error}")
            if not planned.fits:
                over = max(p - float(m) for p, m in zip(planned.peak_bytes, planned.graph.memory_limit, strict=True))
                fail(f"iteration {number}: {schedule} does not fit, {over:.0f} bytes over a rank's limit even with the "
                     "leanest recompute; raise --pp or --tp, or use another --schedule")  # fmt: skip
            if out is not None:
                plans.append(planned.plan())
                verify(plans[-1])
            found.append(planned)
            advance(f"iteration {number}: {planned.iteration_time:.3f} s")
    if out is not None:
        write_plans(out, plans)
    for number, lines in enumerate(csvs):
        assert csv_out is not None
        path = csv_out if number == 0 else csv_out.with_name(f"{csv_out.stem}-{number}{csv_out.suffix}")
        path.write_text(lines, encoding="utf-8")
    if as_json:
        data = [entry(p) | {"evaluations": p.statistics.evaluations} for p in found]
        print_json({"schedule": schedule, "iterations": data, "out": str(out) if out else None})
    else:
        click.echo(plan_table(found))
        if out is not None:
            click.echo(f"{len(plans)} plan{'s' * (len(plans) > 1)} written to {out}")
