"""The joint simulator: compiled equals plain, bit for bit; bounds hold for every set that can run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Kind, ModalityModule, OperationGraph, Unit
from dip_megatron.core.bounds import lower_bound
from dip_megatron.core.errors import CouplingError
from dip_megatron.core.experts import ExpertLayers
from dip_megatron.core.lower import make_plan_set
from dip_megatron.core.simulate import DeadlockError, simulate_compiled, simulate_set, simulate_set_compiled
from dip_megatron.core.verify import verify
from tests.core.joint.drawn_sets import drawn_set, with_fault
from tests.drawn import settings

seeds = st.integers(0, 2**32 - 1)


def outcome(simulator, drawn):
    try:
        return simulator(drawn.graphs, drawn.schedules, drawn.experts)
    except (DeadlockError, CouplingError) as error:
        return str(error)


def assert_equal(one, other):
    assert type(one) is type(other)
    if isinstance(one, str):
        assert one == other
        return
    assert one.iteration_time == other.iteration_time
    for a, b in zip(one.replicas, other.replicas, strict=True):
        assert a.iteration_time == b.iteration_time
        np.testing.assert_array_equal(a.peak_bytes, b.peak_bytes)
        for name in ("start", "end"):
            for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
                np.testing.assert_array_equal(x, y)


@settings(100, deadline=None)
@given(seeds)
def test_compiled_equals_plain(seed):
    drawn = drawn_set(seed)
    plain = simulate_set(drawn.graphs, drawn.schedules, drawn.experts)
    assert_equal(simulate_set_compiled(drawn.graphs, drawn.schedules, drawn.experts), plain)


@settings(60, deadline=None)
@given(seeds, seeds)
def test_compiled_equals_plain_where_plans_do_not_fit_together(seed, fault):
    drawn = with_fault(drawn_set(seed), fault)
    try:
        for graph, schedule in zip(drawn.graphs, drawn.schedules, strict=True):
            simulate_compiled(graph, schedule)
    except DeadlockError:
        return  # not even alone
    assert_equal(outcome(simulate_set_compiled, drawn), outcome(simulate_set, drawn))


@settings(60, deadline=None)
@given(seeds)
def test_events_start_together_and_last_as_long_as_the_longest(seed):
    drawn = drawn_set(seed)
    line = simulate_set_compiled(drawn.graphs, drawn.schedules, drawn.experts)
    for p in range(drawn.graphs[0].ranks):
        spans = []
        for graph, schedule, timeline in zip(drawn.graphs, drawn.schedules, line.replicas, strict=True):
            meets, rows = drawn.experts.meets(graph), graph.virtual_microbatches
            at = [
                i for i, c in enumerate(schedule.orders[p].tolist())
                if c // rows != Kind.W and meets[c % rows, p]
            ]  # fmt: skip
            own = [
                (graph.forward, graph.backward, graph.weight, graph.fused)[c // rows][0, c % rows, p]
                for c in schedule.orders[p][at].tolist()
            ]
            spans.append((timeline.start[p][at], timeline.end[p][at], np.array(own)))
        for start, end, _ in spans:
            np.testing.assert_array_equal(start, spans[0][0])
            np.testing.assert_array_equal(end, spans[0][1])
        longest = np.max([own for *_, own in spans], axis=0)
        np.testing.assert_array_equal(spans[0][1], spans[0][0] + longest)


@settings(60, deadline=None)
@given(seeds)
def test_without_experts_every_replica_runs_as_alone(seed):
    drawn = drawn_set(seed)
    nobody = ExpertLayers(())
    joint = simulate_set_compiled(drawn.graphs, drawn.schedules, nobody)
    for graph, schedule, timeline in zip(drawn.graphs, drawn.schedules, joint.replicas, strict=True):
        alone = simulate_compiled(graph, schedule)
        assert timeline.iteration_time == alone.iteration_time
        np.testing.assert_array_equal(timeline.peak_bytes, alone.peak_bytes)
    assert joint.iteration_time == max(t.iteration_time for t in joint.replicas)


@settings(100, deadline=None)
@given(seeds)
def test_no_set_is_faster_than_its_bound(seed):
    drawn = drawn_set(seed)
    time = simulate_set_compiled(drawn.graphs, drawn.schedules, drawn.experts).iteration_time
    bound = lower_bound(*drawn.graphs, experts=drawn.experts)
    assert bound <= time * (1 + 1e-9)


def test_the_bound_knows_that_the_first_event_waits_for_its_longest_member():
    """Two ranks, one microbatch: replica 0 is short on the first rank and long on the second."""
    modules = (ModalityModule("text", ((1, 1),)),)
    units = (Unit(0, "text", 0, 0, 1, ()),)

    def replica(first: float, second: float) -> OperationGraph:
        seconds = np.array([[[first, second]]])
        return OperationGraph(
            ranks=2, modules=modules, units=units, forward=seconds, backward=seconds, weight=seconds,
            fused=2.0 * seconds, activation=np.ones((1, 1, 2)), deferred_activation=np.ones((1, 1, 2)),
            transfer=np.zeros(1), static_bytes=np.zeros(2), memory_limit=np.full(2, np.inf),
        )  # fmt: skip

    graphs = [replica(1.0, 7.0), replica(5.0, 1.0)]
    experts = ExpertLayers.every(modules, ["text"])
    # The first rank's event takes 5 s, then the second has 7 s forward and 14 s of gradients.
    assert lower_bound(*graphs, experts=experts) == pytest.approx(5.0 + 7.0 + 14.0)
    assert max(lower_bound(graph) for graph in graphs) < 5.0 + 7.0 + 14.0


@settings(40, deadline=None)
@given(seeds)
def test_the_bound_holds_where_copies_of_one_replica_meet(seed):
    """Replicas that are copies of one another but for their seconds meet as they are numbered."""
    first = drawn_set(seed, replicas=2)
    rng = np.random.default_rng(seed)
    one = first.graphs[0]
    slower = {name: getattr(one, name) * rng.uniform(0.5, 2.0, one.forward.shape) for name in ("forward", "backward")}
    other = replace(one, **slower, fused=slower["backward"] + one.weight)
    time = simulate_set([one, other], [first.schedules[0]] * 2, first.experts).iteration_time
    assert lower_bound(one, other, experts=first.experts) <= time * (1 + 1e-9)


@settings(40, deadline=None)
@given(seeds)
def test_plans_made_together_pass_and_predict_the_joint_time(seed):
    drawn = drawn_set(seed)
    bound = lower_bound(*drawn.graphs, experts=drawn.experts)
    joint = make_plan_set(drawn.graphs, drawn.schedules, drawn.experts, lower_bound=bound)
    verify(*joint.plans)
    assert {p.predicted.iteration_time for p in joint.plans} == {joint.timeline.iteration_time}
    assert [p.coupled.replica for p in joint.plans if p.coupled] == list(range(len(joint.plans)))


def test_events_of_different_chunks_are_refused():
    drawn = drawn_set(3)
    other = replace(drawn, schedules=(drawn.schedules[0], *drawn.schedules[1:]))
    for fault in range(200):
        found = outcome(simulate_set, with_fault(other, fault))
        if isinstance(found, str) and "can't be one event" in found:
            return
    pytest.fail("no drawn fault brought two chunks together")
