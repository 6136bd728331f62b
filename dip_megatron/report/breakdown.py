"""Where an iteration's time goes on each rank: computing, waiting, and what is neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from ..core import Plan
from ..core.idle_causes import idle_before
from ..core.simulate import simulate_compiled
from .tables import seconds, table

if TYPE_CHECKING:  # a run is broken down without torch
    from ..runtime.clock import MeasuredSpan

WARM_UP = 5  # iterations that also allocate memory and learn costs; left out of medians


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one rank's iteration, from its common start to the end of the last rank.

    ``operations``: its stages. ``cores_lent``: those during which another thread or process had the rank's core (the
    planner, the network's threads, other programs); only known where the host computes, and no part of ``operations``.
    ``waiting``: a stage on another rank had to end first. ``reading``: the next batch was read although the data was
    there. ``between``: all other time between two operations (transport, launching, bookkeeping). ``end``: other ranks
    still ran. These add up to the iteration. ``outside``, on top of it: from the iteration before to this one
    (reduction of gradients, optimizer, logging).
    """

    operations: float
    cores_lent: float
    waiting: float
    reading: float
    between: float
    end: float
    outside: float | None = None


FIELDS = ("operations", "cores_lent", "waiting", "reading", "between", "end", "outside")


def planned_breakdown(plan: Plan) -> list[Breakdown]:
    """As the plan foresees it: a rank computes, waits for data, or is between two operations."""
    timeline = simulate_compiled(plan.graph, plan.schedule)
    found = []
    for start, computed, end in zip(timeline.start, timeline.computed, timeline.end, strict=True):
        last = float(end[-1]) if len(end) else 0.0
        busy, between = float((computed - start).sum()), float((end - computed).sum())
        waiting = last - busy - between
        found.append(Breakdown(busy, 0.0, waiting, 0.0, between, timeline.iteration_time - last))
    return found


def measured_breakdown(
    plan: Plan, spans: Sequence[Sequence[MeasuredSpan]], outside: Sequence[float | None]
) -> list[Breakdown]:
    """From what each rank measured: ``spans[rank]`` in the order of its plan, ``outside[rank]`` before it."""
    start = [np.array([s.start for s in line]) for line in spans]
    end = [np.array([s.end for s in line]) for line in spans]
    idle = idle_before(plan.graph, plan.schedule.orders, start, end)
    whole = max((float(e[-1]) for e in end if len(e)), default=0.0)
    found = []
    for rank, line in enumerate(spans):
        read = np.array([s.reading_seconds for s in line])
        # Reading comes first in a gap: what of it fits into the wait for data costs nothing.
        reading = np.clip(read - idle[rank].waiting, 0.0, idle[rank].between)
        wall = float((end[rank] - start[rank]).sum())
        known = all(s.core_seconds is not None for s in line)
        cores = sum(s.core_seconds or 0.0 for s in line) if known else wall
        lent = max(wall - cores, 0.0)
        found.append(
            Breakdown(
                wall - lent, lent, float(idle[rank].waiting.sum()), float(reading.sum()),
                float((idle[rank].between - reading).sum()), whole - float(end[rank][-1]) if len(line) else whole,
                outside[rank],
            )
        )  # fmt: skip
    return found


def gaps(plan: Plan, spans: Sequence[Sequence[MeasuredSpan]]) -> list[float]:
    """Seconds between two operations, of all ranks, wherever the later one's data was there when the earlier ended."""
    start = [np.array([s.start for s in line]) for line in spans]
    end = [np.array([s.end for s in line]) for line in spans]
    idle = idle_before(plan.graph, plan.schedule.orders, start, end)
    return [float(b) for i in idle for b, w in zip(i.between[1:], i.waiting[1:], strict=True) if w <= 0]


def as_dicts(planned: Sequence[Breakdown], measured: Sequence[Breakdown]) -> dict[str, list[dict[str, float | None]]]:
    """For a line of ``iterations.jsonl``."""
    return {"planned": [asdict(b) for b in planned], "measured": [asdict(b) for b in measured]}


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over iterations, from lines of ``iterations.jsonl``; the first few are left out if there are others.

    Raises ValueError if no line has a breakdown.
    """
    lines = [line for line in lines if "breakdown" in line]
    if not lines:
        raise ValueError("no iteration with a breakdown; runs of this version with --dip-trace-dir write them")
    lines = lines[WARM_UP:] or lines

    def medians(kind: str, rank: int) -> dict[str, float | None]:
        ranks = [line["breakdown"][kind][rank] for line in lines]
        return {field: _median([r[field] for r in ranks]) for field in FIELDS}

    ratios = [line["predicted_seconds"] / line["iteration_seconds"] for line in lines if line["iteration_seconds"] > 0]
    return {
        "iterations": len(lines),
        "measured_seconds": _median([line["iteration_seconds"] for line in lines]),
        "predicted_seconds": _median([line["predicted_seconds"] for line in lines]),
        "prediction_error": _median([abs(ratio - 1.0) for ratio in ratios]),
        "bubble_ratio_planned": _median([line["bubble_ratio_planned"] for line in lines]),
        "bubble_ratio_measured": _median([line["bubble_ratio_measured"] for line in lines]),
        "planner_core_seconds": _median([line["planner_core_seconds"] for line in lines]),
        **{
            kind: [medians(kind, rank) for rank in range(len(lines[0]["breakdown"][kind]))]
            for kind in ("planned", "measured")
        },
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


_COLUMNS = ("operations", "core lent", "waiting", "reading", "between", "end", "outside")


def breakdown_table(found: Mapping[str, Any]) -> Table:
    """A row for each rank, planned and measured, and what the mean rank's measured time has more than planned."""
    rows = []
    for rank, (planned, measured) in enumerate(zip(found["planned"], found["measured"], strict=True)):
        rows += [(f"rank {rank}, planned", _cells(planned)), (f"rank {rank}, measured", _cells(measured))]
    more = {
        field: sum(
            (m[field] or 0.0) - (p[field] or 0.0) for p, m in zip(found["planned"], found["measured"], strict=True)
        )
        / len(found["planned"])
        for field in FIELDS[:-1]
    }
    rows.append(("more than planned, mean", _cells(more)))
    return table(f"Where an iteration's time goes, medians of {found['iterations']}", ("", *_COLUMNS), rows)


def _cells(values: Mapping[str, float | None]) -> dict[str, str | None]:
    cells: dict[str, str | None] = {}
    for column, field in zip(_COLUMNS, FIELDS, strict=True):
        value = values.get(field)
        cells[column] = None if value is None else seconds(value)
    return cells


def headline(found: Mapping[str, Any]) -> str:
    """Prediction against measurement, and what makes the difference."""
    causes = {
        "operations with what passes between them": ("operations", "cores_lent", "reading", "between"),
        "waiting for other ranks' stages": ("waiting",),
        "the end": ("end",),
    }
    ranks = list(zip(found["planned"], found["measured"], strict=True))
    more = {
        cause: sum(measured[f] - planned[f] for planned, measured in ranks for f in fields) / len(ranks)
        for cause, fields in causes.items()
    }
    told = ", ".join(f"{cause} {'+' if value >= 0 else '-'}{seconds(abs(value))}" for cause, value in more.items())
    return (
        f"an iteration: measured {seconds(found['measured_seconds'])}, predicted {seconds(found['predicted_seconds'])} "
        f"(off by {found['prediction_error']:.1%}) | bubbles: measured {found['bubble_ratio_measured']:.1%}, planned "
        f"{found['bubble_ratio_planned']:.1%} | the planner had a core for {seconds(found['planner_core_seconds'])}\n"
        f"a mean rank's time beyond the plan's: {told}"
    )
