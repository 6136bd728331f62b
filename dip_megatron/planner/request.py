"""What a planner is asked, and what makes a plan of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..schedule import Plan

Load = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PlanRequest:
    """One iteration to plan: per microbatch and module the tokens of each instance. ``budget_seconds`` is for the
    search alone. ``speed`` is measured over predicted time of recent iterations, for calibration."""

    iteration: int
    loads: tuple[Load, ...]
    budget_seconds: float
    forward_only: bool = False


class PlanMaker(Protocol):
    """Turns requests into plans; picklable, since planner workers are processes of their own."""

    def quick(self, request: PlanRequest) -> Plan:
        """A good plan within milliseconds, in this process, without compiled code."""
        ...

    def best(self, request: PlanRequest, give: Callable[[Plan], None]) -> Plan:
        """The best plan found within the request's budget; ``give`` takes a first valid plan early."""
        ...
