"""What a report shows, read from a plan file or from the folder of a run's traces."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..core import Plan
from ..core.files import read_plans
from ..core.graph import Floats
from ..core.simulate import Timeline, simulate_compiled
from .recorder import ABOUT, LAST_PLAN, LINES, TRACE


@dataclass(frozen=True, eq=False)
class Measured:
    """Start and end (seconds) of each operation: ``start[rank][i]`` belongs to ``orders[rank][i]`` of the plan."""

    start: tuple[Floats, ...]
    end: tuple[Floats, ...]

    @property
    def seconds(self) -> float:
        """The iteration, from its common start to the end of the last rank."""
        return max((float(e[-1]) for e in self.end if len(e)), default=0.0)


@dataclass(frozen=True, eq=False)
class Observed:
    """A run's last iteration, or one plan; and a line for each iteration or plan.

    ``lines`` have the fields of :class:`IterationReport` as far as they are known; those of a plan file have no
    measured ones. ``replicas``: lines of further replicas, by the name of their folder.
    """

    source: str
    plan: Plan | None
    planned: Timeline | None
    measured: Measured | None
    lines: Sequence[Mapping[str, Any]]
    replicas: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises ValueError, which names file and line, or OSError."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: line {number}: not JSON ({error.msg}); give the folder of --dip-trace-dir"
            ) from error
        if not isinstance(line, dict):
            raise ValueError(f"{path}: line {number}: not an iteration; give the folder of --dip-trace-dir")
        lines.append(line)
    return lines


def observed(path: Path, number: int = 1, progress: Callable[[], None] = lambda: None) -> Observed:
    """What is known of ``path``: a plan file (``number``, from 1, is the plan whose timeline is shown), or the folder
    of a run's ``--dip-trace-dir``.

    ``progress`` is called after each plan read. Raises PlanFileError, DeadlockError, ValueError or OSError.
    """
    return _of_run(path) if path.is_dir() else _of_plans(path, number, progress)


def _of_plans(path: Path, number: int, progress: Callable[[], None]) -> Observed:
    shown: Plan | None = None
    lines = []
    for place, plan in enumerate(read_plans(path), 1):
        if place == number:
            shown = plan
        lines.append(
            {
                "iteration": place,
                "schedule": plan.name,
                "predicted_seconds": plan.predicted.iteration_time,
                "lower_bound": plan.predicted.lower_bound,
                "bubble_ratio_planned": plan.predicted.bubble_ratio,
                "plan_seconds": plan.search.seconds,
            }
        )
        progress()
    if shown is None:
        raise ValueError(f"{path}: there is no plan {number}; the file has {len(lines)}")
    return Observed(f"{path.name}, plan {number}", shown, _planned(shown), None, lines)


def _of_run(folder: Path) -> Observed:
    if not (folder / LINES).exists():
        raise ValueError(f"{folder}: no {LINES} in it; give a plan file, or the folder of a run's --dip-trace-dir")
    replicas = {
        line.parent.name: json_lines(line) for line in sorted(folder.glob(f"dp*_tp0/{LINES}")) if line.is_file()
    }
    plan = measured = None
    if (folder / LAST_PLAN).exists():
        plan = next(islice(read_plans(folder / LAST_PLAN), 1))
        measured = _measured(folder / TRACE, plan) if (folder / TRACE).exists() else None
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8")) if (folder / ABOUT).exists() else {}
    planned = None if plan is None else _planned(plan)
    lines = json_lines(folder / LINES)
    if not lines:
        raise ValueError(f"{folder / LINES}: no iteration in it; the run has ended before its first")
    return Observed(str(folder), plan, planned, measured, lines, replicas, about)


def _planned(plan: Plan) -> Timeline:
    return simulate_compiled(plan.graph, plan.schedule)


def _measured(path: Path, plan: Plan) -> Measured | None:
    """The measured lane of a trace; None if it is not of this plan."""
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        found = {
            (event["pid"], event["args"]["stage"]): (event["ts"] * 1e-6, (event["ts"] + event["dur"]) * 1e-6)
            for event in events
            if event["ph"] == "X" and event["tid"] == 1
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a trace that this version writes") from error
    try:
        times = [
            np.array([found[rank, str(o)] for o in plan.schedule.operations(plan.graph, rank)]).reshape(-1, 2)
            for rank in range(plan.graph.ranks)
        ]
    except KeyError:
        return None
    return Measured(tuple(t[:, 0] for t in times), tuple(t[:, 1] for t in times))
