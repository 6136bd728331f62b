"""What ``dip trace`` and ``dip plot`` draw: one plan of a plan file, simulated, or what the replicas of a run did."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from ..core import Plan
from ..core.files import read_plans
from ..core.simulate import simulate
from ..report.spans import Span, spans_of
from ..report.trace import read_trace


def planned_spans(path: Path, number: int) -> tuple[Plan, list[Span]]:
    """Plan ``number`` (from 1) of a file, and its operations as planned.

    Raises PlanFileError, ValueError if the file has fewer plans, or DeadlockError.
    """
    plan = next(islice(read_plans(path), number - 1, None), None)
    if plan is None:
        raise ValueError(f"{path}: there is no plan {number}; the file has fewer")
    return plan, spans_of(plan.graph, plan.schedule, simulate(plan.graph, plan.schedule))


def measured_replicas(folder: Path) -> dict[str, list[Span]]:
    """What the data-parallel replicas of a run measured in its last iteration, from its folder of traces; by name, in
    order. Raises ValueError if there are none, OSError."""
    found = {0: folder / "trace.json"} if (folder / "trace.json").is_file() else {}
    for path in folder.glob("dp*_tp0/trace.json"):
        found[int(re.findall(r"dp(\d+)_tp0", path.parent.name)[0])] = path
    if not found:
        raise ValueError(f"{folder}: no trace.json in it; give the folder of --dip-trace-dir, once the run has ended")
    return {f"replica {number}": read_trace(path)[1] for number, path in sorted(found.items())}
