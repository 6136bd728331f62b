"""A plan set: the plans of all replicas that run together, one or several."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .experts import NO_EXPERTS, Coupled, ExpertLayers
from .plan import Plan
from .simulate.kernels import simulate_set_compiled
from .simulate.reference import SetTimeline


@dataclass(frozen=True, eq=False)
class PlanSet:
    """The plans of one iteration, ``plans[replica]``.

    A replica that shares no experts is a set of one. Plans of several replicas have their :class:`Coupled` each, and
    predict the time of all together, because collectives wait for the last member.
    """

    plans: tuple[Plan, ...]

    @staticmethod
    def of(plans: Sequence[Plan], experts: ExpertLayers) -> PlanSet:
        """Couple plans that were made for one another."""
        count = len(plans)
        return PlanSet(tuple(replace(p, coupled=Coupled(g, count, experts)) for g, p in enumerate(plans)))

    @property
    def experts(self) -> ExpertLayers:
        """The layers in which the replicas meet."""
        coupled = self.plans[0].coupled
        return NO_EXPERTS if coupled is None else coupled.experts

    @property
    def iteration_time(self) -> float:
        """Predicted seconds, the same for all replicas."""
        return max(plan.predicted.iteration_time for plan in self.plans)

    @cached_property
    def timeline(self) -> SetTimeline:
        """The plans simulated together."""
        return simulate_set_compiled([p.graph for p in self.plans], [p.schedule for p in self.plans], self.experts)

    def digest(self) -> str:
        """SHA-256 over the digests of all plans, which members of a group compare before they run."""
        return hashlib.sha256("".join(plan.digest() for plan in self.plans).encode()).hexdigest()
