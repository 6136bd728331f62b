"""Plans for replicas that share experts: made together, told to all of them, or to none."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Kind, OperationGraph, Plan
from dip_megatron.core.errors import CouplingError
from dip_megatron.core.experts import ExpertLayers
from dip_megatron.core.lower import make_plan_set
from dip_megatron.core.plan_set import PlanSet
from dip_megatron.core.simulate import simulate_set
from dip_megatron.core.verify import verify
from dip_megatron.describe.cost import Corrections, Line, load_cluster
from dip_megatron.describe.cost.corrections import KINDS, seconds_of
from dip_megatron.describe.model import (
    Experts,
    LanguageHead,
    ModulePartition,
    ModuleShape,
    MultimodalModel,
    Parallel,
    Partition,
    TokenEmbedding,
    TransformerLayer,
)
from dip_megatron.describe.workload import Microbatch
from dip_megatron.families.shared.shapes import GptShapes
from dip_megatron.planner.delivery import CoupledReplicas, PlanDelivery, PlanMismatchError
from dip_megatron.planner.facade import live_maker
from dip_megatron.planner.maker import LivePlanMaker
from dip_megatron.planner.model_graphs import ModelGraphs
from dip_megatron.planner.plan_cache import PlanCache
from dip_megatron.planner.recalibration import Measurement, Recalibration
from dip_megatron.planner.request import PlanRequest
from dip_megatron.planner.service import PlannerService
from dip_megatron.schedulers.entry import Effort
from dip_megatron.schedulers.joint import one_slot_at_a_time, pairings, together
from dip_megatron.schedulers.registry import find_schedule
from tests.drawn import settings
from tests.planner.test_delivery import Shared, ThreadExchange, with_other_codes


@dataclass(frozen=True)
class Span:
    start: float
    end: float


LAYER = TransformerLayer(64, 128, 4, 4, gated=True, causal=True, experts=Experts(8, 2, 48))
MODEL = MultimodalModel(
    "moe",
    (ModuleShape("language", "text", 4, LAYER, TokenEmbedding(256), LanguageHead(256)),),
    Parallel(pp=2, dp=2, sequence_parallel=False, distributed_optimizer=False, ep=2),
)
LAYERS = ((1, 1), (0, 2))
WITH_EXPERTS = ExpertLayers.of({"language": [[[True] * n for n in row] for row in LAYERS]})
LOADS = tuple(tuple(Microbatch(n, sequences=(n,)) for n in lengths) for lengths in ((512, 64, 256), (96, 480, 300)))


def maker(schedule: str = "dynamic", limit: float | None = None, **effort) -> LivePlanMaker:
    graphs = ModelGraphs(
        MODEL, load_cluster("cpu"), Partition((ModulePartition("language", LAYERS, None),)), memory_limit=limit
    )
    shapes = GptShapes(64, 1, 1, "float32")
    return live_maker(find_schedule(schedule), graphs, shapes, Effort(**effort), label=schedule, experts=WITH_EXPERTS)


def request(loads=LOADS, **more) -> PlanRequest:
    return PlanRequest(7, loads, 0.0, **more)


@pytest.mark.parametrize("schedule", ["dynamic", "static"])
@pytest.mark.parametrize("forward_only", [False, True])
def test_every_plan_passes_the_joint_verifier(schedule, forward_only):
    plans = maker(schedule, evaluations=100, deterministic=True)
    asked = request(forward_only=forward_only)
    for joint in (plans.quick(asked), plans.best(asked, lambda _: None), maker(schedule).quick(asked)):
        verify(*joint.plans)
        assert len({plan.predicted.iteration_time for plan in joint.plans}) == 1
        assert all(plan.payloads for plan in joint.plans)


def test_searching_helps_and_its_first_plan_comes_early():
    given: list[PlanSet] = []
    plans = maker(evaluations=400, deterministic=True)
    best = plans.best(request(), given.append)
    assert len(given) == 1
    assert best.iteration_time <= given[0].iteration_time <= maker().quick(request()).iteration_time
    assert best.plans[0].predicted.lower_bound > 0


def test_little_memory_is_kept_to_by_all_replicas():
    static = maker().builder.build(LOADS[0], False).static_bytes.max()
    whole = maker().quick(request())
    limit = static + 0.55 * (max(max(p.predicted.peak_bytes) for p in whole.plans) - static)
    lean = maker(limit=limit).quick(request())
    verify(*lean.plans)
    assert max(max(plan.predicted.peak_bytes) for plan in lean.plans) <= limit


def test_a_faulty_set_is_named():
    good = maker().quick(request())
    verify(*good.plans)
    graphs = [maker().builder.build(loads, False) for loads in LOADS]
    slots = pairings(graphs, WITH_EXPERTS)[0]
    slow = one_slot_at_a_time(together(graphs, WITH_EXPERTS, slots))
    other = make_plan_set(graphs, slow, WITH_EXPERTS, lower_bound=0.0)
    with pytest.raises(CouplingError) as raised:
        verify(good.plans[0], other.plans[1])
    assert raised.value.condition == "order"


class Replicas:
    """Two replicas of two stages: exchanges of the replicas and among their first ranks, in threads."""

    def __init__(self, corrupt=None):
        self._own, self._firsts = [Shared(2, corrupt if r == 1 else None) for r in (0, 1)], Shared(2)

    def run(self, function):
        """``[function(delivery, replica, stage)]``, of stages within replicas; exceptions as results."""

        def one(place: int):
            replica, stage = divmod(place, 2)
            own = ThreadExchange(self._own[replica], stage)
            firsts = ThreadExchange(self._firsts, replica) if stage == 0 else None
            plans = maker(evaluations=50, deterministic=True)
            service = PlannerService(plans, 0) if place == 0 else None
            delivery = PlanDelivery(own, service, True, CoupledReplicas(2, replica, firsts))
            assert delivery.plans_here == (stage == 0)
            try:
                return function(delivery, replica, stage)
            except Exception as error:
                return error
            finally:
                delivery.close()

        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(one, range(4)))


def deliver(loads, corrupt=None):
    def take(delivery: PlanDelivery, replica: int, stage: int):
        mine = loads[replica] if stage == 0 else ()
        delivery.request(PlanRequest(7, (mine,), 0.0), 0.0, shared=f"of replica {replica}")
        return delivery.take(7, news=bytes([2 * replica + stage]))

    return Replicas(corrupt).run(take)


def test_each_replica_gets_its_own_of_the_plans_that_were_made_together():
    answers = deliver(LOADS)
    digests = [answer.plan.digest() for answer in answers]
    assert digests[0] == digests[1] != digests[2] == digests[3]
    assert [answer.plan.coupled.replica for answer in answers] == [0, 0, 1, 1]
    verify(answers[0].plan, answers[2].plan)
    assert [answer.shared for answer in answers] == [f"of replica {r}" for r in (0, 0, 1, 1)]
    assert answers[3].news == (bytes([2]), bytes([3]))


def test_replicas_that_ask_for_other_numbers_of_microbatches_all_stop():
    answers = deliver((LOADS[0], LOADS[1][:2]))
    assert all(isinstance(answer, RuntimeError) for answer in answers)
    assert "other numbers of microbatches: 3, 2" in str(answers[0])
    assert len({str(answer) for answer in answers}) == 1


def test_a_rank_with_another_plan_stops_all_replicas():
    answers = deliver(LOADS, lambda rank, data: with_other_codes(data) if rank == 1 and len(data) > 1000 else data)
    assert all(isinstance(answer, PlanMismatchError) for answer in answers)
    assert "ranks [1] of replica 1 of those that share experts" in str(answers[0])
    assert len({str(answer) for answer in answers}) == 1


def measured(joint: PlanSet, truth: Sequence[OperationGraph]) -> list[list[Measurement]]:
    """What replicas measure whose stages take what ``truth`` says: one that is ready waits for the others inside of the
    operation in which they meet."""
    schedules = [plan.schedule for plan in joint.plans]
    found = []
    for graph, schedule, ran in zip(
        truth, schedules, simulate_set(truth, schedules, WITH_EXPERTS).replicas, strict=True
    ):
        rows, ended, theirs = graph.virtual_microbatches, {}, []
        for p, order in enumerate(schedule.orders):
            for code, end in zip(order.tolist(), ran.end[p].tolist(), strict=True):
                if code // rows != Kind.W:
                    ended[Kind.F if code // rows == Kind.F else Kind.B, code % rows, p] = end
        for p, order in enumerate(schedule.orders):
            free, spans = 0.0, []
            for code, end in zip(order.tolist(), ran.end[p].tolist(), strict=True):
                inputs = graph.inputs(Kind(code // rows), code % rows, p)
                arrivals = [ended[d.kind, d.virtual_microbatch, d.rank] + d.seconds for d in inputs]
                spans.append((max([free, *arrivals]), end))
                free = end
            theirs.append(Measurement(7, p, np.array(spans)))
        found.append(theirs)
    return found


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_what_stages_took_with_their_waits_corrects_the_costs_of_all(seed: int) -> None:
    draw = np.random.default_rng(seed)
    truth = Corrections(tuple(
        Line("language", k, kind, tuple(draw.uniform(0.0, 2e-5, 2)), tuple(draw.uniform(0.3, 4.0, 2)))
        for k in range(2) for kind in KINDS
    ))  # fmt: skip
    plans, recalibration, off = maker(), Recalibration(), []
    for _ in range(12):
        loads = tuple(
            tuple(Microbatch(n, sequences=(n,)) for n in row) for row in draw.integers(48, 600, (2, 3)).tolist()
        )
        asked = request(loads, corrections=recalibration.corrections())
        joint = plans.quick(asked)
        true = [
            truth.apply(plans.builder.build(theirs, False)).project(plan.schedule.strategy)
            for theirs, plan in zip(loads, joint.plans, strict=True)
        ]
        took = simulate_set(true, [plan.schedule for plan in joint.plans], WITH_EXPERTS).iteration_time
        off.append(abs(joint.iteration_time / took - 1.0))
        recalibration.observe(joint, asked.corrections, measured(joint, true))
    assert off[-1] < 1e-5
    assert off[0] > 0.01


def three_times(plan: Plan, rank: int) -> list[Span]:
    """Of an iteration in which every operation takes three times what the model says."""
    graph = maker().builder.build(LOADS[0], False).project(plan.schedule.strategy)
    found = [Span(0.0, 0.0)]
    for code in plan.schedule.orders[rank].tolist():
        kind, row = divmod(code, graph.virtual_microbatches)
        start = found[-1].end
        found.append(Span(start, start + 3 * float(seconds_of(graph, Kind(kind))[0, row, rank])))
    return found[1:]


def test_all_replicas_plan_with_what_all_have_measured():
    """Two iterations later."""

    def train(delivery: PlanDelivery, replica: int, stage: int) -> list[tuple[Plan, Corrections]]:
        found = []
        for number in range(4):
            delivery.request(PlanRequest(number, (LOADS[0] if stage == 0 else (),), 0.0), 0.0)
            plan = delivery.take(number).plan
            delivery.measured(Measurement.of(number, stage, three_times(plan, stage)))
            found.append((plan, delivery.corrections()))
        return found

    ranks = Replicas().run(train)
    for plans in zip(*ranks, strict=True):
        assert len({repr(corrections) for _, corrections in plans}) == 1
    for (plan, _), known in zip(ranks[1], (False, False, False, True), strict=True):
        predicted = plan.predicted
        assert (predicted.uncorrected_time is not None) == known
        if predicted.uncorrected_time is not None:
            assert predicted.iteration_time == pytest.approx(3 * predicted.uncorrected_time, rel=0.05)


def test_what_was_measured_outlives_an_evaluation_before_the_next_iteration():
    """That iteration was asked for before; the evaluation takes in what was measured, and nobody asks again by then."""

    def train(delivery: PlanDelivery, replica: int, stage: int) -> Corrections:
        loads = LOADS[replica] if stage == 0 else ()
        delivery.request(PlanRequest(0, (loads,), 0.0), 0.0)
        for number in range(4):
            plan = delivery.take(number).plan
            delivery.request(PlanRequest(number + 1, (loads,), 0.0), 0.0)
            delivery.measured(Measurement.of(number, stage, three_times(plan, stage)))
            delivery.request(PlanRequest(100 + number, (loads,), 0.0, forward_only=True), 0.0)
            delivery.take(100 + number)
        delivery.take(4)
        return delivery.corrections()

    assert all(corrections.lines for corrections in Replicas().run(train))


def test_plans_are_kept_for_what_all_replicas_hold():
    known = PlanCache()
    known.keep(request(), maker().quick(request()), searched=False)
    assert known.plan(request()) is not None
    assert known.plan(request((LOADS[0], LOADS[0]))) is None
