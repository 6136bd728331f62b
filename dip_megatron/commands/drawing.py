"""What ``dip trace`` and ``dip plot`` share: one plan of a plan file, simulated."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from ..core import Plan
from ..core.files import read_plans
from ..core.simulate import simulate
from ..report.spans import Span, spans_of


def planned_spans(path: Path, number: int) -> tuple[Plan, list[Span]]:
    """Plan ``number`` (from 1) of a file, and its operations as planned.

    Raises PlanFileError, ValueError if the file has fewer plans, or DeadlockError.
    """
    plan = next(islice(read_plans(path), number - 1, None), None)
    if plan is None:
        raise ValueError(f"{path}: there is no plan {number}; the file has fewer")
    return plan, spans_of(plan.graph, plan.schedule, simulate(plan.graph, plan.schedule))
