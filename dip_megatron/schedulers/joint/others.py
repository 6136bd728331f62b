"""Any schedule of the registry for coupled replicas: its order of the maxima, run by all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...core.experts import ExpertLayers
from ...core.graph import OperationGraph
from ...core.order import Schedule
from ...core.plan import SearchStatistics
from ...core.simulate import simulate_set_compiled
from ...describe.model import Partition
from ..entry import Effort, FoundSet, Problem, ScheduleEntry, SetProblem
from .pairing import Slots, as_they_come
from .together import together


@dataclass(frozen=True, eq=False)
class CoupledSchedule:
    """``schedules[g]`` of coupled replicas, which take ``iteration_time`` seconds together."""

    schedules: tuple[Schedule, ...]
    iteration_time: float


def find_set(entry: ScheduleEntry, problem: SetProblem) -> FoundSet:
    """Put coupled replicas in order under any schedule: as it does itself where it can, else by its order of the
    maxima, with microbatches paired as they come. Raises what the schedule and :func:`.together.together` raise."""
    if entry.find_set is not None:
        return entry.find_set(problem)
    slots = as_they_come(problem.graphs)
    found = schedule_together(entry, problem.graphs, problem.experts, slots, effort=problem.effort, group=problem.group)
    return FoundSet(found.schedules, SearchStatistics(workers=1))


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
    return CoupledSchedule(tuple(schedules), time)


def mixed_experts(choice: Partition, modules: Sequence[str]) -> ExpertLayers:
    """The expert layers of the chunks of a partition, whose ``modules`` have experts in all layers."""
    return ExpertLayers.of({
        part.module: [
            [tuple(run.module in modules for run in chunk for _ in range(run.layers)) for chunk in line]
            for line in part.chunks
        ]
        for part in choice.modules
    })  # fmt: skip
