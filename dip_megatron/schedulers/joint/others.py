"""Any schedule of the registry for coupled replicas: its order of the maxima, run by all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...core.experts import ExpertLayers
from ...core.graph import OperationGraph
from ...core.order import Schedule
from ...core.simulate import simulate_compiled, simulate_set_compiled
from ..entry import Effort, Problem, ScheduleEntry
from ..static import StaticChoice
from .pairing import Slots
from .together import together


@dataclass(frozen=True, eq=False)
class CoupledSchedule:
    """``schedules[g]`` of coupled replicas, which take ``iteration_time`` seconds together; ``fits``: every rank of
    every replica stays within its memory."""

    schedules: tuple[Schedule, ...]
    iteration_time: float
    fits: bool


def schedule_together(
    entry: ScheduleEntry, graphs: Sequence[OperationGraph], experts: ExpertLayers, slots: Slots, *,
    effort: Effort | None = None, group: int | None = None,
) -> CoupledSchedule:  # fmt: skip
    """A schedule that knows nothing of coupling, applied to replicas whose microbatches meet as ``slots`` says: put in
    order for what is the most in every place, with one choice of recompute for all, as flags would have it. Raises what
    the schedule and :func:`.together.together` raise."""
    t = together(graphs, experts, slots)
    found = entry.find(Problem(t.graph, effort or Effort(), group))
    schedules = t.schedules(found.schedule)
    time = simulate_set_compiled(graphs, schedules, experts).iteration_time
    fits = all(
        bool(np.all(simulate_compiled(g, s).peak_bytes <= g.memory_limit))
        for g, s in zip(graphs, schedules, strict=True)
    )
    return CoupledSchedule(tuple(schedules), time, fits)


def mixed_experts(choice: StaticChoice, modules: Sequence[str]) -> ExpertLayers:
    """The expert layers of the mixed chunks of a choice, whose ``modules`` have experts in all layers."""
    ranks = len(choice.stages) // choice.segments
    flags = [tuple(run.module in modules for run in stage for _ in range(run.layers)) for stage in choice.stages]
    rows = [flags[k * ranks : (k + 1) * ranks] for k in range(choice.segments)]
    return ExpertLayers.of({"model": [row[::-1] if choice.turned and k == 1 else row for k, row in enumerate(rows)]})
