"""Plan files that carry sets: the plans of coupled replicas on consecutive lines, replica by replica."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ..files import PlanFileError, read_plans, write_plans
from ..plan import Plan
from .sets import JointPlan


def sets_of(plans: Iterable[Plan], path: str | Path) -> Iterator[tuple[Plan, ...]]:
    """The plans in sets, one by one as they are read; a plan that is coupled with none is a set by itself. Raises
    PlanFileError where a set is not complete."""
    started: list[Plan] = []
    for number, plan in enumerate(plans, start=1):
        if plan.coupled is None:
            _complete(started, path, number)
            yield (plan,)
            continue
        if plan.coupled.replica != len(started) or (
            started and started[0].coupled is not None and plan.coupled.replicas != started[0].coupled.replicas
        ):
            raise PlanFileError(
                f"{path}: plan {number}: coupled: replica {plan.coupled.replica} of {plan.coupled.replicas} stands "
                f"where replica {len(started)} of its set belongs"
            )
        started.append(plan)
        if len(started) == plan.coupled.replicas:
            yield tuple(started)
            started = []
    _complete(started, path, None)


def _complete(started: list[Plan], path: str | Path, number: int | None) -> None:
    if not started or started[0].coupled is None:
        return
    where = "at its end" if number is None else f"before plan {number}"
    raise PlanFileError(
        f"{path}: coupled: {len(started)} plans of a set of {started[0].coupled.replicas} {where}; the others are "
        "missing"
    )


def read_joint_plans(path: str | Path) -> Iterator[JointPlan]:
    """The sets of a file. Raises PlanFileError for a line that is malformed, not coupled, or not of a complete set."""
    for i, plans in enumerate(sets_of(read_plans(path), path), start=1):
        if plans[0].coupled is None:
            raise PlanFileError(
                f"{path}: set {i}: its plan names no replicas that it is coupled with; plan them together"
            )
        yield JointPlan(plans)


def write_joint_plans(path: str | Path, sets: Iterable[JointPlan]) -> None:
    """Write sets, a line for each plan. Raises OSError if the file can't be written."""
    write_plans(path, (plan for joint in sets for plan in joint.plans))
