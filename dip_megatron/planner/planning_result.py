"""One batch's plan and all that is reported about it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core import Kind, OperationGraph, Plan, Schedule, SearchStatistics
from ..core.bounds import lower_bound
from ..core.lower import make_plan
from ..core.simulate import simulate_compiled


@dataclass(frozen=True, eq=False)
class PlanningResult:
    """One batch's plan: ``plan_seconds`` from the batch to the schedule (pricing included, tuning before training not);
    ``recompute_fraction``, the share of all compute time that the memory strategies cost."""

    graph: OperationGraph
    schedule: Schedule
    statistics: SearchStatistics
    iteration_time: float
    bubble_ratio: float
    peak_bytes: tuple[float, ...]
    lower_bound: float
    fits: bool
    recompute_fraction: float
    plan_seconds: float
    name: str

    def plan(self) -> Plan:
        """The plan with its actions. Raises DeadlockError if the orders can't end."""
        return make_plan(
            self.graph, self.schedule, lower_bound=self.lower_bound, name=self.name, search=self.statistics
        )


def describe(
    graph: OperationGraph,
    schedule: Schedule,
    name: str,
    plan_seconds: float,
    statistics: SearchStatistics | None = None,
    bound: float | None = None,
) -> PlanningResult:
    """Simulate a schedule and put down all that is reported about it. The bound is that of its own graph: with split
    backwards where the schedule splits any."""
    timeline = simulate_compiled(graph, schedule)
    if bound is None:
        bound = lower_bound(graph, split=splits(graph, schedule))
    return PlanningResult(
        graph=graph,
        schedule=schedule,
        statistics=statistics or SearchStatistics(plan_seconds, 1, 1, 0),
        iteration_time=timeline.iteration_time,
        bubble_ratio=timeline.bubble_ratio,
        peak_bytes=tuple(float(b) for b in timeline.peak_bytes),
        lower_bound=bound,
        fits=bool(np.all(timeline.peak_bytes <= graph.memory_limit)),
        recompute_fraction=recompute_fraction(graph, schedule),
        plan_seconds=plan_seconds,
        name=name,
    )


def splits(graph: OperationGraph, schedule: Schedule) -> bool:
    """Whether any stage of the schedule runs B and W apart."""
    return any(bool(np.any(order // graph.virtual_microbatches == int(Kind.W))) for order in schedule.orders)


def recompute_fraction(graph: OperationGraph, schedule: Schedule) -> float:
    """Share of all compute time that is spent on the memory strategies: on recomputing, and waiting for offloading."""
    chosen = np.take_along_axis(graph.forward + graph.fused, schedule.strategy[None].astype(np.int64), axis=0)[0]
    fastest = (graph.forward + graph.fused).min(axis=0)
    total = float(chosen.sum())
    return float((chosen - fastest).sum()) / total if total > 0 else 0.0
