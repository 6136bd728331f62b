"""Planning for replicas that share experts: one planner makes the plans of all, which agree where they meet.

See :mod:`dip_megatron.core.coupled_checks` for what such plans must keep to, and ``docs/experts.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..core import OperationGraph, Plan, Schedule, SearchStatistics
from ..core.errors import CouplingError, PlanError
from ..core.experts import ExpertLayers
from ..core.lower import make_plan_set
from ..core.plan_set import PlanSet
from ..core.simulate import simulate_compiled, simulate_set_compiled
from ..core.verify import verify
from ..schedulers.dip.engine import warm_up
from ..schedulers.entry import Effort, ScheduleEntry
from ..schedulers.joint import as_they_come, one_slot_at_a_time, pairings, search_joint, together
from ..schedulers.joint.others import schedule_together
from ..schedulers.registry import find_schedule
from ..schedulers.greedy import greedy
from .maker import GraphBuilder, OperationShapes, PayloadShapes, payloads, work_bound
from .model_graphs import ModelGraphs
from .request import AnyPlan, PlanRequest
from .warm import warm_up_joint_plans


def verify_any(plan: AnyPlan) -> None:
    """Raises PlanError at the first fault of a plan, or of a set of plans."""
    try:
        verify(*([plan] if isinstance(plan, Plan) else plan.plans))
    except CouplingError as error:
        raise PlanError(f"plans of coupled replicas ({error.condition}): {error}") from error


@dataclass(frozen=True)
class JointPlanMaker:
    """Plan maker of coupled replicas (see :class:`planner.request.PlanMaker`); picklable. Takes requests with what all
    ``replicas`` hold, and makes plans that meet in the stages with ``experts``."""

    builder: GraphBuilder
    shapes: PayloadShapes | OperationShapes
    experts: ExpertLayers
    entry: ScheduleEntry
    effort: Effort
    name: str

    def warm_up(self) -> None:
        """Compile the search's kernels, or load them from numba's cache."""
        warm_up_joint_plans(search=self.entry.searches)
        if self.entry.searches:
            warm_up()

    def quick(self, request: PlanRequest) -> PlanSet:
        """The greedy order of the maxima, microbatches paired by work; one slot after the other if that doesn't fit.
        Where a search counts its schedules, it is searched for, too."""
        if self.effort.evaluations is not None and not request.forward_only:
            return self.best(request, lambda _: None)
        return self._greedy(request, self._corrected(request, self._graphs(request)))

    def _greedy(self, request: PlanRequest, graphs: Sequence[OperationGraph]) -> PlanSet:
        return self._plan(request, graphs, self._greedy_schedules(graphs), SearchStatistics(), "greedy")

    def _greedy_schedules(self, graphs: Sequence[OperationGraph]) -> list[Schedule]:
        t = together(graphs, self.experts, pairings(graphs, self.experts)[0])
        schedules = t.schedules(greedy(t.graph))
        return schedules if _fit(graphs, schedules) else one_slot_at_a_time(t)

    def best(self, request: PlanRequest, give: Callable[[PlanSet], None]) -> PlanSet:
        """Pairing and orders searched within the request's budget; the first set is given at once. Neither is slower
        than the greedy's, which a search that has hardly begun can be. Under any other schedule: its order of the
        maxima, run by all, microbatches as they come."""
        built = self._graphs(request)
        graphs = self._corrected(request, built)
        if request.forward_only:
            return self._greedy(request, graphs)
        if self.entry != find_schedule("dynamic"):
            found = schedule_together(self.entry, graphs, self.experts, as_they_come(graphs), effort=self.effort)
            if not found.fits:
                return self._greedy(request, graphs)
            made = self._plan(request, graphs, found.schedules, SearchStatistics(workers=1), self.name)
            return self._with_model_seconds(request, made, built, found.schedules)
        simple = self._greedy_schedules(graphs)
        simple_seconds = simulate_set_compiled(graphs, simple, self.experts).iteration_time
        given = False

        def improved(schedules: Sequence[Schedule], seconds: float) -> None:
            nonlocal given
            if not given:
                given = True
                better = schedules if seconds <= simple_seconds else simple
                give(self._plan(request, graphs, better, SearchStatistics(workers=1), self.name))

        effort = self.effort
        best = search_joint(
            graphs, self.experts, budget_seconds=request.seconds_left(), seed=effort.seed,
            evaluations=effort.evaluations, workers=effort.workers, options=effort.options, on_improved=improved,
        )  # fmt: skip
        statistics = SearchStatistics(best.seconds, best.evaluations, effort.workers, effort.seed)
        schedules = best.schedules if best.iteration_time <= simple_seconds else simple
        bound = min(best.lower_bound, best.iteration_time, simple_seconds)
        made = self._plan(request, graphs, schedules, statistics, self.name, bound)
        return self._with_model_seconds(request, made, built, schedules)

    def _graphs(self, request: PlanRequest) -> list[OperationGraph]:
        return [self.builder.build(loads, request.forward_only, request.training) for loads in request.replicas]

    @staticmethod
    def _corrected(request: PlanRequest, graphs: Sequence[OperationGraph]) -> list[OperationGraph]:
        return [request.corrections.apply(graph) for graph in graphs]

    def _with_model_seconds(
        self, request: PlanRequest, joint: PlanSet, built: Sequence[OperationGraph], schedules: Sequence[Schedule]
    ) -> PlanSet:
        """With what the cost model alone predicts, if measurements have corrected it."""
        if not request.corrections.lines:
            return joint
        plain = [graph.project(s.strategy) for graph, s in zip(built, schedules, strict=True)]
        orders = [plan.schedule for plan in joint.plans]
        seconds = simulate_set_compiled(plain, orders, self.experts).iteration_time
        return PlanSet(tuple(replace(p, predicted=replace(p.predicted, uncorrected_time=seconds)) for p in joint.plans))

    def _plan(
        self, request: PlanRequest, graphs: Sequence[OperationGraph], schedules: Sequence[Schedule],
        statistics: SearchStatistics, name: str, bound: float | None = None,
    ) -> PlanSet:  # fmt: skip
        shapes = [payloads(g, loads, self.shapes) for g, loads in zip(graphs, request.replicas, strict=True)]
        bound = max(map(work_bound, graphs)) if bound is None else bound
        return make_plan_set(
            graphs, schedules, self.experts, lower_bound=bound, name=name, payloads=shapes, search=statistics
        )


def _fit(graphs: Sequence[OperationGraph], schedules: Sequence[Schedule]) -> bool:
    peaks = [simulate_compiled(g, s).peak_bytes for g, s in zip(graphs, schedules, strict=True)]
    return all(bool(np.all(peak <= g.memory_limit)) for peak, g in zip(peaks, graphs, strict=True))


def joint_maker(
    entry: ScheduleEntry, graphs: ModelGraphs, shapes: PayloadShapes | OperationShapes, effort: Effort,
    experts: ExpertLayers, label: str,
) -> JointPlanMaker:  # fmt: skip
    """What plans the batches of a run whose replicas are coupled; ``label`` names the plans."""
    return JointPlanMaker(replace(graphs, paper_costs=entry.paper_costs), shapes, experts, entry, effort, label)
