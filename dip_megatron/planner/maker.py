"""From what a batch holds to a plan for it: graph, search, payload shapes, lowering."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from ..core import Kind, Operation, OperationGraph, Payload, Schedule, SearchStatistics, Unit
from ..core.experts import NO_EXPERTS, ExpertLayers
from ..core.lower import make_plan_set
from ..core.modules import trained_before
from ..core.plan_set import PlanSet
from ..core.simulate import fit_in_memory, simulate_set_compiled
from ..describe.model import Training
from ..describe.workload import Microbatch
from ..schedulers.entry import FoundSet
from ..schedulers.greedy import greedy_set
from .request import PlanRequest


class GraphBuilder(Protocol):
    """Prices a batch; picklable."""

    def build(
        self, loads: tuple[Microbatch, ...], forward_only: bool, training: Training | None = None
    ) -> OperationGraph:
        """The stage graph of one iteration. ``forward_only``: nothing trains. ``training``: what trains of the model as
        built, if it is known."""
        ...


class PayloadShapes(Protocol):
    """What travels between stages; picklable. See :class:`dip_megatron.runtime.protocol.Shapes`."""

    def payload(self, unit: Unit, load: Microbatch, *, leaves_module: bool) -> Payload:
        """Shapes sent on by one stage of ``unit``."""
        ...


@runtime_checkable
class OperationShapes(Protocol):
    """The same, where the stages of one virtual microbatch send different things; picklable."""

    def operation_payload(self, stage: Operation, unit: Unit, load: Microbatch) -> Payload:
        """Shapes sent on by the forward of ``stage``, which is one of ``unit``."""
        ...


class Searcher(Protocol):
    """Finds schedules within a budget; picklable."""

    def warm_up(self, *, coupled: bool) -> None:
        """Load or compile what the search needs; ``coupled``: that of replicas that share experts, too."""
        ...

    def __call__(
        self, graphs: Sequence[OperationGraph], experts: ExpertLayers, budget_seconds: float,
        on_first: Callable[[Sequence[Schedule]], None],
    ) -> FoundSet:  # fmt: skip
        """Find the best schedules, one a replica.

        Args:
            graphs: One graph a replica.
            experts: The layers in which several replicas meet.
            budget_seconds: Seconds to search.
            on_first: Takes the first valid schedules.
        """
        ...


@dataclass(frozen=True)
class LivePlanMaker:
    """Plan maker of a training run; picklable.

    Attributes:
        builder: Prices the microbatches of a replica.
        shapes: What travels between operations.
        search: Finds schedules; None leaves the greedy order.
        name: The name of its plans.
        always_search: Whether plans that are needed at once are searched for, too, rather than made by the greedy.
        experts: The layers in which coupled replicas meet.
    """

    builder: GraphBuilder
    shapes: PayloadShapes | OperationShapes
    search: Searcher | None = None
    name: str = "dip"
    always_search: bool = False
    experts: ExpertLayers = NO_EXPERTS

    def warm_up(self) -> None:
        """See :class:`planner.request.PlanMaker`."""
        if self.search is not None:
            self.search.warm_up(coupled=self.experts != NO_EXPERTS)

    def quick(self, request: PlanRequest) -> PlanSet:
        """By default the dual-queue greedy's plans, which need neither a search nor a worker."""
        if self.always_search and not request.forward_only:
            return self.best(request, lambda _: None)
        start = time.perf_counter()
        return self._greedy(self._corrected(request, self._graphs(request)), request, start)

    def best(self, request: PlanRequest, give: Callable[[PlanSet], None]) -> PlanSet:
        """Search within the request's budget; the first valid schedules are given at once. What fits in no way under
        this schedule is ordered by the greedy, which admits no microbatch that doesn't fit."""
        start = time.perf_counter()
        built = self._graphs(request)
        graphs = self._corrected(request, built)
        if self.search is None:
            return self._greedy(graphs, request, start)

        def first(schedules: Sequence[Schedule]) -> None:
            give(self._plans(graphs, schedules, request, SearchStatistics(workers=1), self.name))

        found = self.search(graphs, self.experts, request.seconds_left(), first)
        if not fit_in_memory(graphs, found.schedules):
            return self._greedy(graphs, request, start)
        statistics = found.statistics or SearchStatistics()
        plans = self._plans(graphs, found.schedules, request, statistics, self.name, found.lower_bound)
        if not request.corrections.lines:
            return plans
        plain = [graph.project(s.strategy) for graph, s in zip(built, found.schedules, strict=True)]
        orders = [plan.schedule for plan in plans.plans]
        seconds = simulate_set_compiled(plain, orders, self.experts).iteration_time
        return PlanSet(tuple(replace(p, predicted=replace(p.predicted, uncorrected_time=seconds)) for p in plans.plans))

    def _graphs(self, request: PlanRequest) -> list[OperationGraph]:
        return [self.builder.build(loads, request.forward_only, request.training) for loads in request.replicas]

    @staticmethod
    def _corrected(request: PlanRequest, graphs: Sequence[OperationGraph]) -> list[OperationGraph]:
        return [request.corrections.apply(graph) for graph in graphs]

    def _greedy(self, graphs: Sequence[OperationGraph], request: PlanRequest, start: float) -> PlanSet:
        schedules = greedy_set(graphs, self.experts)
        statistics = SearchStatistics(time.perf_counter() - start, 1, 0, 0)
        return self._plans(graphs, schedules, request, statistics, "greedy")

    def _plans(
        self, graphs: Sequence[OperationGraph], schedules: Sequence[Schedule], request: PlanRequest,
        statistics: SearchStatistics, name: str, bound: float | None = None,
    ) -> PlanSet:  # fmt: skip
        return make_plan_set(
            graphs, schedules, self.experts, lower_bound=max(map(work_bound, graphs)) if bound is None else bound,
            name=name, search=statistics,
            payloads=[payloads(g, loads, self.shapes) for g, loads in zip(graphs, request.replicas, strict=True)],
        )  # fmt: skip


def payloads(
    graph: OperationGraph, loads: tuple[Microbatch, ...], shapes: PayloadShapes | OperationShapes
) -> dict[tuple[int, ...], Payload]:
    """Shapes of every message: ``(s, s)`` within virtual microbatch s, ``(s, t)`` from s to t; with the sending rank
    where that matters (see :class:`Plan`). A tensor is differentiable where something trains before it."""
    out: dict[tuple[int, ...], Payload] = {}
    before = trained_before(graph.modules)
    through = {  # whether a gradient enters the module from behind
        m.name: any(map(any, before[m.name]))
        or any(m.trains(k, r) for k in range(m.segments) for r in range(graph.ranks))
        for m in graph.modules
    }

    known: dict[tuple[Payload, bool], Payload] = {}  # few for many stages: what is the same is one object

    def settled(payload: Payload, alive: bool) -> Payload:
        if (payload, alive) not in known:
            known[payload, alive] = tuple(
                replace(
                    t, differentiable=t.differentiable and alive and (not t.made_by or through[t.made_by]), made_by=""
                )
                for t in payload
            )
        return known[payload, alive]

    trains = graph.has_backward
    if isinstance(shapes, OperationShapes):
        for s in range(graph.virtual_microbatches):
            unit = graph.units[int(graph.unit_of[s])]
            load = loads[unit.microbatch]
            for r in range(graph.ranks):
                if graph.is_idle[s, r]:
                    continue
                payload = shapes.operation_payload(graph.operation(Kind.F, s, r), unit, load)
                sent = settled(payload, bool(trains[s, r]))
                for target in graph.next_virtual_microbatches[s] if r == graph.exit_rank(s) else (s,):
                    out[s, target, r] = sent
        return out
    modules = [graph.units[u].module for u in graph.unit_of.tolist()]
    for unit in graph.units:
        load = loads[unit.microbatch]
        within = shapes.payload(unit, load, leaves_module=False)
        first = graph.first_virtual_microbatch[unit.id]
        for s in range(first, first + graph.module(unit.module).segments):
            out[s, s] = settled(within, bool(trains[s].any()))
            leaving = bool(trains[s, graph.exit_rank(s)])
            for n in graph.next_virtual_microbatches[s]:
                leaves = modules[n] != unit.module
                out[s, n] = settled(shapes.payload(unit, load, leaves_module=True) if leaves else within, leaving)
    return out


def work_bound(graph: OperationGraph) -> float:
    """No iteration is shorter than the work of its busiest rank: seconds, with the fastest strategy of every stage."""
    backward = np.where(graph.has_weight, np.minimum(graph.fused, graph.backward + graph.weight), graph.backward)
    backward = np.where(graph.has_backward, backward, 0.0)
    return float((graph.forward + backward).min(axis=0).sum(axis=0).max())
