"""One line per training iteration: what was planned, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..core.protocols import Timed
from ..core.simulate import idle_share
from ..planner.delivery import DeliveredPlan
from ..planner.exchange_agreement import ExchangeReport


@dataclass(frozen=True)
class IterationReport:
    """``iteration`` is the training loop's number, from 1; the rest is seconds unless it says otherwise. Measured
    values are of one rank; bubbles are idle shares of the iteration.

    ``uncorrected_seconds``: what the cost model alone predicts for the plan, where measurements have corrected it.
    ``plan_seconds`` is the search, ``latency_seconds`` all from asking for the plan to its arrival, ``stall_seconds``
    what training waited for it (all of planning where that was done ``at_call``), ``planner_core_seconds`` what the
    planner needed of a core.
    ``outside_seconds``: from the end of the iteration before to the start of this one (reductions, optimizer, logging);
    None after a pause, such as an evaluation. ``fallbacks``, ``late_plans`` and ``worker_deaths``
    count since the start of training: plans made in the trainer because no worker's had come, plans whose search was
    not over, planner workers replaced. ``exchange``: of this iteration's microbatches between
    replicas, if there was one.
    """

    iteration: int
    schedule: str
    iteration_seconds: float
    predicted_seconds: float
    lower_bound: float
    bubble_ratio_planned: float
    bubble_ratio_measured: float
    plan_seconds: float
    stall_seconds: float
    evaluations: int
    fallback: bool
    uncorrected_seconds: float | None = None
    latency_seconds: float = 0.0
    fallbacks: int = 0
    late_plans: int = 0
    worker_deaths: int = 0
    planner_core_seconds: float = 0.0
    outside_seconds: float | None = None
    exchange: ExchangeReport | None = None
    at_call: bool = False

    @staticmethod
    def of(
        iteration: int, delivered: DeliveredPlan, spans: Sequence[Timed], outside_seconds: float | None = None,
        exchange: ExchangeReport | None = None,
    ) -> IterationReport:  # fmt: skip
        """Report of a rank that executed ``spans``."""
        plan, statistics = delivered.plan, delivered.statistics
        seconds = max((s.end for s in spans), default=0.0)
        busy = sum(s.end - s.start for s in spans)
        return IterationReport(
            iteration=iteration,
            schedule=plan.name,
            iteration_seconds=seconds,
            predicted_seconds=plan.predicted.iteration_time,
            lower_bound=plan.predicted.lower_bound,
            bubble_ratio_planned=plan.predicted.bubble_ratio,
            bubble_ratio_measured=idle_share(busy, seconds),
            plan_seconds=plan.search.seconds,
            stall_seconds=delivered.stall_seconds,
            evaluations=plan.search.evaluations,
            fallback=plan.name == "greedy",
            uncorrected_seconds=plan.predicted.uncorrected_time,
            latency_seconds=statistics.latency_seconds,
            fallbacks=statistics.fallbacks,
            late_plans=statistics.late,
            worker_deaths=statistics.worker_deaths,
            planner_core_seconds=statistics.core_seconds,
            outside_seconds=outside_seconds,
            exchange=exchange,
            at_call=delivered.at_call,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
