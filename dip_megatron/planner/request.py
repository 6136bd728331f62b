"""What a planner is asked, and what makes a plan of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..schedule import Plan
from ..workload import Microbatch

READY = b"ready"
"""What a worker sends when it can plan."""


@dataclass(frozen=True)
class PlanRequest:
    """One iteration to plan, by what its microbatches hold. ``budget_seconds`` is for the search alone."""

    iteration: int
    loads: tuple[Microbatch, ...]
    budget_seconds: float
    forward_only: bool = False


class PlanMaker(Protocol):
    """Turns requests into plans; picklable, since planner workers are processes of their own."""

    def warm_up(self) -> None:
        """Load or compile what planning needs, before the first request."""
        ...

    def quick(self, request: PlanRequest) -> Plan:
        """A good plan within milliseconds, in this process, without compiled code."""
        ...

    def best(self, request: PlanRequest, give: Callable[[Plan], None]) -> Plan:
        """The best plan found within the request's budget; ``give`` takes a first valid plan early."""
        ...
