"""``dip check``: the strict verifier on plan files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from ..core import Plan
from ..core.action_csv import ActionCsvError, read_actions
from ..core.files import PlanFileError, plan_sets_of, read_plans
from ..core.lower import make_plan
from ..core.plan_set import PlanSet
from ..core.simulate import simulate_set
from ..core.simulate.reference import DeadlockError
from ..core.verify import PlanError, verify
from .common import fail, json_option, print_json, progress_bar

TOLERANCE = 1e-9


@click.command()
@click.argument("plans", type=click.Path(path_type=Path))
@json_option
@click.pass_context
def check(ctx: click.Context, plans: Path, as_json: bool) -> None:
    """Verify every plan of PLANS (JSON lines, or a CSV of actions as torch.distributed.pipelining reads it), and
    together those of replicas that are coupled: exit 1 and name the first fault, 2 if the file is malformed."""
    count, fault = 0, None
    try:
        with progress_bar(f"verifying {plans}", None, as_json) as advance:
            for together in plan_sets_of(_plans(plans), plans):
                first, count = count + 1, count + len(together.plans)
                try:
                    verify(*together.plans)
                    check_prediction(together)
                except ValueError as error:
                    place = f"plan {count}" if first == count else f"plans {first} to {count}"
                    fault = f"{plans}: {place}: {' '.join(str(error).split())}"
                    break
                advance(f"verifying {plans}: {count}")
    except (PlanFileError, ActionCsvError) as error:
        fail(str(error))
    if as_json:
        print_json({"plans": count, "ok": fault is None, "fault": fault})
    elif fault is not None:
        click.echo(fault, err=True)
    else:
        click.echo(f"{plans}: {count} plan{'s' * (count > 1)}, no fault")
    if fault is not None:
        ctx.exit(1)


def _plans(path: Path) -> Iterator[Plan]:
    """The plans of a file; of a CSV the one order, with stages of equal length."""
    if path.suffix != ".csv":
        yield from read_plans(path)
        return
    graph, schedule = read_actions(path)
    try:
        yield make_plan(graph, schedule, lower_bound=0.0, name="csv")
    except DeadlockError as error:
        raise ActionCsvError(f"{path}: {error}") from error


def check_prediction(together: PlanSet) -> None:
    """Raise PlanError where what the plans predict is not what simulating them together gives."""
    plans = together.plans
    timeline = simulate_set([p.graph for p in plans], [p.schedule for p in plans], together.experts)
    for replica, plan in enumerate(plans):
        peaks = timeline.replicas[replica].peak_bytes.tolist()
        _compare(plan, timeline.iteration_time, timeline.bubble_ratio(replica), peaks)


def _compare(plan: Plan, time: float, bubbles: float, peak_bytes: Sequence[float]) -> None:
    claims = [
        ("iteration_time", plan.predicted.iteration_time, time),
        ("bubble_ratio", plan.predicted.bubble_ratio, bubbles),
    ]
    peaks = zip(plan.predicted.peak_bytes, peak_bytes, strict=True)
    claims += [(f"peak_bytes[{rank}]", claimed, found) for rank, (claimed, found) in enumerate(peaks)]
    for name, claimed, found in claims:
        if abs(claimed - found) > TOLERANCE * max(1.0, abs(found)):
            of = "" if plan.coupled is None else f"replica {plan.coupled.replica}: "
            raise PlanError(f"{of}predicted.{name} is {claimed}, simulating the plan gives {found}")
