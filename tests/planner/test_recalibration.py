"""What stages took comes back into the plans: lines are found, hiccups are not believed, and loops stay stable."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Kind, OperationGraph, Plan
from dip_megatron.core.lower import make_plan
from dip_megatron.core.plan_set import PlanSet
from dip_megatron.core.simulate import simulate
from dip_megatron.describe.cost import Corrections, Line
from dip_megatron.describe.cost.corrections import KINDS, seconds_of
from dip_megatron.describe.workload import Microbatch
from dip_megatron.planner.delivery import PlanDelivery
from dip_megatron.planner.recalibration import Measurement, Recalibration
from dip_megatron.planner.request import PlanRequest
from dip_megatron.planner.service import PlannerService
from dip_megatron.schedulers.greedy import greedy
from tests.drawn import settings
from tests.graphs import random_graph
from tests.planner.makers import Maker
from tests.planner.test_delivery import Shared, ThreadExchange


@dataclass(frozen=True)
class Ran:
    start: float
    end: float


def graph_of(seed: int) -> OperationGraph:
    """Batches of one model: the modules are drawn from ``seed // 100``, the durations from ``seed``."""
    graph = random_graph(seed // 100, ranks=2, microbatches=4, candidates=1, frozen=False)
    scale = np.random.default_rng(seed).uniform(0.5, 2.0, (1, graph.virtual_microbatches, 1))
    arrays = {name: getattr(graph, name) * scale for name in ("forward", "backward", "weight", "fused")}
    return replace(graph, memory_limit=np.full(2, np.inf), **arrays)


def plan_of(graph: OperationGraph, corrections: Corrections) -> Plan:
    corrected = corrections.apply(graph)
    return make_plan(corrected, greedy(corrected), lower_bound=0.0)


def run(plan: Plan, truth: OperationGraph, noise=lambda i: 1.0, overhead: float = 0.0) -> list[Measurement]:
    """Every operation in turn, for as long as ``truth`` says."""
    measurements = []
    for rank, order in enumerate(plan.schedule.orders):
        clock, spans = 0.0, []
        for i, code in enumerate(order.tolist()):
            kind, row = divmod(code, truth.virtual_microbatches)
            seconds = float(seconds_of(truth, Kind(kind))[0, row, rank]) * noise(i)
            spans.append(Ran(clock, clock + seconds))
            clock += seconds + overhead
        measurements.append(Measurement.unpack(Measurement.of(0, rank, spans).pack()))
    return measurements


def over(a: OperationGraph, b: OperationGraph, kind: Kind) -> np.ndarray:
    """A graph's durations over another's, of the stages that take any: modules on every rank have idle ones."""
    durations, others = seconds_of(a, kind), seconds_of(b, kind)
    assert not durations[others == 0].any()
    return durations[others > 0] / others[others > 0]


def off(a: OperationGraph, b: OperationGraph, kinds=(Kind.F, Kind.BW)) -> float:
    """Largest relative difference of two graphs' durations; the greedy leaves backwards whole."""
    return max(float(np.max(np.abs(over(a, b, k) - 1.0))) for k in kinds)


def lines(seed: int, graph: OperationGraph, fixed: float) -> Corrections:
    draw = np.random.default_rng(seed)
    return Corrections(
        tuple(
            Line(m.name, k, kind, tuple(draw.uniform(0, fixed, graph.ranks)), tuple(draw.uniform(0.3, 5, graph.ranks)))
            for m in graph.modules
            for k in range(m.segments)
            for kind in KINDS
        )
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 2e-3]))
def test_plans_come_to_say_what_is_measured(seed: int, fixed: float) -> None:
    """Though each is made with the corrections of those before."""
    truth = lines(seed, graph_of(100 * seed), fixed)
    recalibration = Recalibration()
    for i in range(25):
        graph = graph_of(100 * seed + i % 100)
        corrections = recalibration.corrections()
        plan = plan_of(graph, corrections)
        recalibration.observe(PlanSet((plan,)), corrections, [run(plan, truth.apply(graph))])
    graph = graph_of(100 * seed + 99)
    corrected, true = recalibration.corrections().apply(graph), truth.apply(graph)
    assert off(corrected, true) < (1e-3 if fixed == 0.0 else 0.2)
    assert off(graph, true) > off(corrected, true)
    # Backwards in two have not run; they are as far off as whole ones were.
    whole = over(corrected, graph, Kind.BW)
    assert np.all(over(corrected, graph, Kind.B) > 0)
    if fixed == 0.0:
        assert over(corrected, graph, Kind.B) == pytest.approx(whole, rel=1e-3)


def test_a_model_of_little_but_what_never_grows_is_corrected() -> None:
    """Prices that differ by a tenth for stages of which one takes four times as long as another."""

    def priced(seed: int, price: Callable[[np.ndarray], np.ndarray]) -> OperationGraph:
        graph = graph_of(seed)
        sizes = np.random.default_rng(seed).uniform(0.5, 2.0, (1, graph.virtual_microbatches, 1))
        arrays: dict[str, Any] = {
            name: np.where(getattr(graph, name) > 0, price(sizes), 0.0)
            for name in ("forward", "backward", "weight", "fused")
        }
        return replace(graph, **arrays)

    model = lambda seed: priced(seed, lambda sizes: 1e-3 * (1 + 0.1 * sizes))  # noqa: E731
    truth = lambda seed: priced(seed, lambda sizes: 0.08 * sizes)  # noqa: E731
    recalibration = Recalibration()
    for seed in range(100, 108):
        corrections = recalibration.corrections()
        plan = plan_of(model(seed), corrections)
        recalibration.observe(PlanSet((plan,)), corrections, [run(plan, truth(seed))])
    assert off(recalibration.corrections().apply(model(110)), truth(110)) < 0.02


@pytest.mark.parametrize("first", [lambda sizes: 3e-3 / sizes, lambda sizes: 1e-3 * sizes**4], ids=["falling", "steep"])
def test_whatever_line_was_found_first_gives_way_to_a_better_one(first: Callable[[np.ndarray], np.ndarray]) -> None:
    """Neither of two that can come of few measurements is kept for good: larger units that seem to take less, and a
    line so steep that it gives small units no time at all. What is drawn later are small units."""

    def priced(seed: int, largest: float, price: Callable[[np.ndarray], np.ndarray]) -> OperationGraph:
        graph = graph_of(seed)
        sizes = np.random.default_rng(seed).uniform(0.5, largest, (1, graph.virtual_microbatches, 1))
        arrays: dict[str, Any] = {
            name: np.where(getattr(graph, name) > 0, price(sizes), 0.0)
            for name in ("forward", "backward", "weight", "fused")
        }
        return replace(graph, **arrays)

    def twice(sizes: np.ndarray) -> np.ndarray:
        return 2e-3 * sizes

    recalibration = Recalibration()
    for i in range(30):
        largest, truth = (2.0, first) if i < 3 else (0.7, twice)
        model = priced(100 + i, largest, lambda sizes: 1e-3 * sizes)
        corrections = recalibration.corrections()
        plan = plan_of(model, corrections)
        recalibration.observe(PlanSet((plan,)), corrections, [run(plan, priced(100 + i, largest, truth))])
    model = priced(150, 0.7, lambda sizes: 1e-3 * sizes)
    assert off(recalibration.corrections().apply(model), priced(150, 0.7, twice)) < 0.1


def test_hiccups_are_not_believed() -> None:
    recalibration = Recalibration()
    plan = plan_of(graph_of(1), Corrections())
    for iteration in range(10):
        slow = 3 if iteration == 9 else -1
        hiccup = lambda i, slow=slow: 50.0 if i == slow else 1.0  # noqa: E731
        recalibration.observe(PlanSet((plan,)), Corrections(), [run(plan, graph_of(1), hiccup)])
    # One fresh iteration weighs about a fifth: believed, it would have made its stage ten times as slow.
    assert 0.0 < off(recalibration.corrections().apply(graph_of(1)), graph_of(1)) < 0.8


def test_drift_is_followed() -> None:
    recalibration = Recalibration()
    plan = plan_of(graph_of(1), Corrections())
    for factor in (1.0,) * 20 + (3.0,) * 15:
        slow = run(plan, graph_of(1), lambda i, factor=factor: factor)
        recalibration.observe(PlanSet((plan,)), Corrections(), [slow])
    ratio = seconds_of(recalibration.corrections().apply(graph_of(1)), Kind.F) / seconds_of(graph_of(1), Kind.F)
    assert ratio == pytest.approx(3.0, rel=0.1)


def test_overhead_between_operations_counts() -> None:
    recalibration = Recalibration()
    plan = plan_of(graph_of(1), Corrections())
    for _ in range(3):
        recalibration.observe(PlanSet((plan,)), Corrections(), [run(plan, graph_of(1), overhead=1e-3)])
    corrections = recalibration.corrections()
    added = corrections.apply(graph_of(1)).forward.mean() - graph_of(1).forward.mean()
    assert added == pytest.approx(1e-3, rel=0.2)
    assert corrections.overhead == pytest.approx((1e-3, 1e-3), rel=0.05)


def test_what_passes_before_the_first_operation_is_shared_out() -> None:
    recalibration = Recalibration()
    plan = plan_of(graph_of(1), Corrections())
    late = [replace(m, seconds=m.seconds + 6e-3) for m in run(plan, graph_of(1), overhead=1e-3)]
    for _ in range(3):
        recalibration.observe(PlanSet((plan,)), Corrections(), [late])
    expected = 1e-3 + 6e-3 / len(plan.schedule.orders[0])
    assert recalibration.corrections().overhead[0] == pytest.approx(expected, rel=0.05)


def test_bubbles_are_planned_as_they_are_measured() -> None:
    """What passes between operations is idle in both."""
    truth, seconds = graph_of(1), 0.5 * float(graph_of(1).forward.mean())
    recalibration = Recalibration()
    first = plan_of(truth, Corrections())
    for _ in range(3):
        recalibration.observe(PlanSet((first,)), Corrections(), [run(first, truth, overhead=seconds)])
    corrections = recalibration.corrections()
    plan = plan_of(truth, corrections)
    ends = np.zeros((truth.virtual_microbatches, 2, len(KINDS)))
    timeline = simulate(plan.graph, plan.schedule)
    busy = 0.0
    for rank, order in enumerate(plan.schedule.orders):
        for code, end in zip(order.tolist(), timeline.end[rank], strict=True):
            kind, row = divmod(code, truth.virtual_microbatches)
            busy += float(seconds_of(truth, Kind(kind))[0, row, rank])
            ends[row, rank, kind] = end
    # The operations alone, as spans are measured, in the time that all takes.
    assert plan.predicted.bubble_ratio == pytest.approx(1.0 - busy / (2 * ends.max()), abs=0.02)
    blind = replace(plan.graph, overhead=())
    assert simulate(blind, plan.schedule).bubble_ratio < plan.predicted.bubble_ratio - 0.1


def test_what_takes_no_time_still_takes_none() -> None:
    graph = graph_of(1)
    frozen = replace(graph, weight=np.zeros_like(graph.weight))
    assert not lines(1, graph, 1e-3).apply(frozen).weight.any()
    assert Corrections().apply(graph) is graph


def test_nothing_is_learned_from_the_first_iteration_or_from_ranks_that_do_not_fit() -> None:
    recalibration = Recalibration()
    plan = plan_of(graph_of(1), Corrections())
    recalibration.observe(PlanSet((plan,)), Corrections(), [run(plan, graph_of(1))])
    assert recalibration.corrections() == Corrections()
    short = [replace(m, seconds=m.seconds[:-1]) for m in run(plan, graph_of(1))]
    recalibration.observe(PlanSet((plan,)), Corrections(), [short])
    assert recalibration.corrections() == Corrections()


@dataclass(frozen=True)
class Asking(Maker):
    """Puts what it was asked into the plan's name."""

    def quick(self, request: PlanRequest) -> PlanSet:
        return self._plan(request, str(len(request.corrections.lines)), 0)


@pytest.mark.parametrize("recalibrate", [True, False])
def test_measurements_travel_with_the_next_plan(recalibrate: bool) -> None:
    shared = Shared(2)

    def one(rank: int) -> list[str]:
        delivery = PlanDelivery(
            ThreadExchange(shared, rank), PlannerService(Asking(), 0) if rank == 0 else None, recalibrate
        )
        names = []
        for iteration in range(4):
            delivery.request(PlanRequest(iteration, ((Microbatch(8),),), 0.0), 0.0)
            delivered = delivery.take(iteration)
            names.append(delivered.plan.name)
            operations = len(delivered.plan.schedule.orders[rank])
            delivery.measured(Measurement.of(iteration, rank, [Ran(i, i + 0.5) for i in range(operations)]))
        delivery.close()
        return names

    with ThreadPoolExecutor(2) as pool:
        names, others = pool.map(one, range(2))
    assert names == others
    # Measured in 1, the first that counts; sent with the taking of 2; known to the request of 3.
    assert [int(n) > 0 for n in names] == [False, False, False, recalibrate]
