"""One line per training iteration: what was planned, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..schedule import Plan


class _Timed(Protocol):
    @property
    def start(self) -> float: ...

    @property
    def end(self) -> float: ...


@dataclass(frozen=True)
class IterationReport:
    """Seconds unless it says otherwise. Measured values are of one rank; bubbles are idle shares of the iteration."""

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

    @staticmethod
    def of(iteration: int, plan: Plan, spans: Sequence[_Timed], stall_seconds: float) -> IterationReport:
        """Report of a rank that executed ``spans``."""
        seconds = max((s.end for s in spans), default=0.0)
        busy = sum(s.end - s.start for s in spans)
        return IterationReport(
            iteration=iteration,
            schedule=plan.name,
            iteration_seconds=seconds,
            predicted_seconds=plan.predicted.iteration_time,
            lower_bound=plan.predicted.lower_bound,
            bubble_ratio_planned=plan.predicted.bubble_ratio,
            bubble_ratio_measured=1.0 - busy / seconds if seconds > 0 else 0.0,
            plan_seconds=plan.search.seconds,
            stall_seconds=stall_seconds,
            evaluations=plan.search.evaluations,
            fallback=plan.search.workers == 0,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
