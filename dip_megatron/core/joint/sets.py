"""A set of plans: one for each of the replicas that expert parallelism couples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..experts import Coupled, ExpertLayers
from ..graph import OperationGraph
from ..lower import lower
from ..order import Schedule
from ..plan import Payload, Plan, Predicted, SearchStatistics
from ..reductions import place_reductions, with_reductions
from .simulate import JointTimeline, simulate_joint_compiled


@dataclass(frozen=True, eq=False)
class JointPlan:
    """The plans of one iteration of all coupled replicas, ``plans[replica]``, each with its :class:`Coupled`. What each
    of them predicts is the joint time: collectives wait for the last member."""

    plans: tuple[Plan, ...]

    @staticmethod
    def of(plans: Sequence[Plan], experts: ExpertLayers) -> JointPlan:
        """Couple plans that were made for one another."""
        count = len(plans)
        return JointPlan(tuple(replace(p, coupled=Coupled(g, count, experts)) for g, p in enumerate(plans)))

    @property
    def experts(self) -> ExpertLayers:
        """Where the replicas meet."""
        coupled = self.plans[0].coupled
        assert coupled is not None
        return coupled.experts

    @property
    def iteration_time(self) -> float:
        """Predicted seconds, the same for all replicas."""
        return max(plan.predicted.iteration_time for plan in self.plans)

    @cached_property
    def timeline(self) -> JointTimeline:
        """The plans simulated together."""
        return simulate_joint_compiled([p.graph for p in self.plans], [p.schedule for p in self.plans], self.experts)

    def digest(self) -> str:
        """What the members of the group compare before they run: SHA-256 over the digests of all plans."""
        return hashlib.sha256("".join(plan.digest() for plan in self.plans).encode()).hexdigest()


def make_joint_plan(
    graphs: Sequence[OperationGraph],
    schedules: Sequence[Schedule],
    experts: ExpertLayers,
    *,
    lower_bound: float,
    name: str = "dip",
    payloads: Sequence[Mapping[tuple[int, ...], Payload]] | None = None,
    search: SearchStatistics | None = None,
) -> JointPlan:
    """:func:`..lower.make_plan` for replicas that are coupled: simulated together, then lowered one by one, with places
    for the starts of their reductions.

    ``graphs[replica]`` with ``schedules[replica]``; ``payloads[replica]`` as in :class:`Plan`. Raises DeadlockError if
    the orders can't end, JointError if the replicas don't meet in the same order.
    """
    projected = [g.project(s.strategy) for g, s in zip(graphs, schedules, strict=True)]
    single = [Schedule(s.orders, np.zeros_like(s.strategy)) for s in schedules]
    joint = simulate_joint_compiled(projected, single, experts)
    count = len(projected)
    places = place_reductions(projected, single, [timeline.end for timeline in joint.replicas])
    plans = []
    for g, (graph, schedule, timeline) in enumerate(zip(projected, single, joint.replicas, strict=True)):
        peak = tuple(float(b) for b in timeline.peak_bytes)
        plans.append(
            Plan(
                graph=graph,
                schedule=schedule,
                codes=with_reductions(graph, lower(graph, schedule, timeline), places[g]),
                predicted=Predicted(joint.iteration_time, lower_bound, joint.bubble_ratio(g), peak),
                name=name,
                payloads=dict(payloads[g]) if payloads else {},
                search=search or SearchStatistics(),
                coupled=Coupled(g, count, experts),
            )
        )
    return JointPlan(tuple(plans))
