"""What a planner is asked, and what makes a plan of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..core.plan_set import PlanSet
from ..describe.cost import Corrections
from ..describe.model import Training
from ..describe.workload import Microbatch
from .prefetch import Prefetch

READY = b"ready"
"""What a worker sends when it can plan."""


@dataclass(frozen=True)
class PlanRequest:
    """An iteration or an evaluation to plan, by what its microbatches hold.

    Attributes:
        request: The number of the request; evaluations have numbers, too.
        replicas: The microbatches of each replica that is planned: one, or all of those that share experts.
        budget_seconds: Seconds for the search alone.
        forward_only: Whether this is an evaluation.
        corrections: What earlier iterations taught about the cost model's seconds.
        deadline: When the search ends at the latest, in seconds of this host's monotonic clock.
        iteration: The training loop's number, for messages: of the iteration to plan, or of the one before the
            evaluation.
        training: What trains of the model as built; None where that isn't known (then it is as described) or doesn't
            matter (an evaluation).
    """

    request: int
    replicas: tuple[tuple[Microbatch, ...], ...]
    budget_seconds: float
    forward_only: bool = False
    corrections: Corrections = field(default_factory=Corrections)
    deadline: float = math.inf
    iteration: int = 0
    training: Training | None = None

    @property
    def loads(self) -> tuple[Microbatch, ...]:
        """The microbatches of the first replica, which is the only one where replicas share no experts."""
        return self.replicas[0]

    @property
    def subject(self) -> str:
        """What is planned, in messages."""
        return f"{'the evaluation after ' if self.forward_only else ''}iteration {self.iteration}"

    def seconds_left(self) -> float:
        """For the search, as of now; never negative."""
        return max(min(self.budget_seconds, self.deadline - time.monotonic()), 0.0)


def differences(asked: Sequence[PlanRequest]) -> str:
    """In what the requests of coupled replicas differ that must be alike; empty if in nothing."""
    for what, values in (
        ("iterations", [r.subject for r in asked]),
        ("numbers of microbatches", [len(r.loads) for r in asked]),
        ("numbers of requests", [r.request for r in asked]),
    ):
        if len(set(values)) > 1:
            return (
                f"replicas that share experts ask for plans of other {what}: {', '.join(map(str, values))}; give all "
                "of them as many microbatches in every iteration, or use --dip-schedule off"
            )
    return ""


class PlanMaker(Protocol):
    """Turns requests into plans; picklable, since planner workers are processes of their own."""

    def warm_up(self) -> None:
        """Load or compile what planning needs, before the first request."""
        ...

    def quick(self, request: PlanRequest) -> PlanSet:
        """Good plans within milliseconds, in this process, without compiled code."""
        ...

    def best(self, request: PlanRequest, give: Callable[[PlanSet], None]) -> PlanSet:
        """The best plans found within the request's budget; ``give`` takes first valid plans early."""
        ...


@dataclass
class PlannerStatistics:
    """Counts since the start of training: ``plans`` taken; ``late`` ones, whose search was not over when they were
    needed; ``fallbacks``, made in the trainer because no worker's plan was there; ``worker_deaths``, replaced workers.
    ``latency_seconds``: from the request of the last plan taken to its arrival; ``core_seconds``: what of a core the
    worker's process needed for it."""

    plans: int = 0
    fallbacks: int = 0
    worker_deaths: int = 0
    late: int = 0
    latency_seconds: float = 0.0
    core_seconds: float = 0.0


class Service(Protocol):
    """What answers requests with plans that have passed the verifier; see :class:`planner.service.PlannerService`."""

    @property
    def statistics(self) -> PlannerStatistics: ...

    def submit(self, request: PlanRequest) -> None:
        """Begin planning; returns at once."""
        ...

    def take(self, request: int, wait_seconds: float, ahead: Prefetch | None = None) -> PlanSet:
        """The plans for a submitted request."""
        ...

    def corrections(self, request: int) -> Corrections | None:
        """Those that the plan just taken was made with, if they aren't the request's; to be asked once."""
        ...

    def close(self) -> None:
        """End all that plans."""
        ...
