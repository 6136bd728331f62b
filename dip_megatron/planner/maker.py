"""From what a batch holds to a plan for it: graph, search, payload shapes, lowering."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from ..core import Kind, Operation, OperationGraph, Payload, Plan, Schedule, SearchStatistics, Unit
from ..core.lower import make_plan
from ..core.modules import trained_before
from ..core.simulate import simulate_compiled
from ..describe.model import Training
from ..describe.workload import Microbatch
from ..schedulers.entry import Found
from ..schedulers.greedy import greedy
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
    """Finds a schedule within a budget; picklable."""

    def warm_up(self) -> None:
        """Load or compile what the search needs."""
        ...

    def __call__(self, graph: OperationGraph, budget_seconds: float, on_first: Callable[[Schedule], None]) -> Found:
        """Best schedule found; ``on_first`` takes the first valid one."""
        ...


@dataclass(frozen=True)
class LivePlanMaker:
    """Plan maker of a training run; picklable. ``search`` None: the greedy order is all there is. ``always_search``:
    what is needed at once is searched for, too, rather than made by the greedy."""

    builder: GraphBuilder
    shapes: PayloadShapes | OperationShapes
    search: Searcher | None = None
    name: str = "dip"
    always_search: bool = False

    def warm_up(self) -> None:
        """See :class:`planner.request.PlanMaker`."""
        if self.search is not None:
            self.search.warm_up()

    def quick(self, request: PlanRequest) -> Plan:
        """By default the dual-queue greedy, which needs neither a search nor a worker."""
        if self.always_search and not request.forward_only:
            return self.best(request, lambda _: None)
        start = time.perf_counter()
        return self._greedy(request.corrections.apply(self._graph(request)), request, start)

    def best(self, request: PlanRequest, give: Callable[[Plan], None]) -> Plan:
        """Search within the request's budget; the first valid schedule is given at once. What fits in no way under
        this schedule is ordered by the greedy, which admits no microbatch that doesn't fit."""
        start = time.perf_counter()
        built = self._graph(request)
        graph = request.corrections.apply(built)
        if self.search is None:
            return self._greedy(graph, request, start)

        def first(schedule: Schedule) -> None:
            give(self._plan(graph, schedule, request, SearchStatistics(workers=1), self.name))

        found = self.search(graph, request.seconds_left(), first)
        schedule = found.schedule
        if not np.all(simulate_compiled(graph, schedule).peak_bytes <= graph.memory_limit):
            return self._greedy(graph, request, start)
        statistics = found.statistics or SearchStatistics()
        plan = self._plan(graph, schedule, request, statistics, self.name, found.lower_bound)
        if graph is built:
            return plan
        plain = simulate_compiled(built.project(schedule.strategy), plan.schedule).iteration_time
        return replace(plan, predicted=replace(plan.predicted, uncorrected_time=plain))

    def _graph(self, request: PlanRequest) -> OperationGraph:
        return self.builder.build(request.loads, request.forward_only, request.training)

    def _greedy(self, graph: OperationGraph, request: PlanRequest, start: float) -> Plan:
        schedule = greedy(graph)
        return self._plan(graph, schedule, request, SearchStatistics(time.perf_counter() - start, 1, 0, 0), "greedy")

    def _plan(
        self, graph: OperationGraph, schedule: Schedule, request: PlanRequest, statistics: SearchStatistics, name: str,
        bound: float | None = None,
    ) -> Plan:  # fmt: skip
        return make_plan(
            graph, schedule, lower_bound=work_bound(graph) if bound is None else bound, name=name,
            payloads=payloads(graph, request.loads, self.shapes), search=statistics,
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
