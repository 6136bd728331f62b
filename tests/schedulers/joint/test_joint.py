"""Plans for coupled replicas: they pass the joint verifier, keep to memory, and are what their search says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import OperationGraph, Schedule
from dip_megatron.core.bounds import lower_bound
from dip_megatron.core.errors import CouplingError
from dip_megatron.core.experts import ExpertLayers
from dip_megatron.core.lower import make_plan_set
from dip_megatron.core.simulate import simulate_compiled, simulate_set_compiled
from dip_megatron.core.verify import verify
from dip_megatron.schedulers.dip.engine import search
from dip_megatron.schedulers.dip.feasibility import DoesNotFitError
from dip_megatron.schedulers.dip.random import seeded
from dip_megatron.schedulers.joint import (
    as_they_come,
    dip_pairing,
    one_slot_at_a_time,
    pairings,
    search_joint,
    together,
)
from dip_megatron.schedulers.joint.chain import JointChain, begin_joint, find_places, make_joint_problem
from dip_megatron.schedulers.joint.moves import change
from dip_megatron.schedulers.joint.sequences import (
    CHANGED,
    NODES,
    JointProblem,
    JointSequences,
    make_joint_sequences,
)
from dip_megatron.schedulers.joint.times import forget, retime, take_back
from dip_megatron.schedulers.joint.together import leanest
from tests.core.joint.drawn_sets import experts_of, graph_of, modules_of
from tests.drawn import settings
from tests.graphs import with_memory

seeds = st.integers(0, 2**32 - 1)


def coupled(seed: int, memory: float | None = None) -> tuple[list[OperationGraph], ExpertLayers]:
    """Replicas of one model with batches of their own, each stage kept, recomputed in part or as a whole."""
    rng = np.random.default_rng(seed)
    ranks, replicas, microbatches = int(rng.integers(1, 4)), int(rng.integers(2, 4)), int(rng.integers(1, 5))
    modules = modules_of(rng, ranks)
    factor = float(rng.choice([1.0, 1.3, 2.0, np.inf])) if memory is None else memory
    graphs = []
    for _ in range(replicas):
        graph = graph_of(rng, modules, ranks, microbatches)
        slower = np.array([0.0, 0.4, 1.0])[:, None, None] * graph.forward
        backward = graph.backward + np.where(graph.has_backward[None], slower, 0.0)
        kept = np.array([1.0, 0.7, 0.2])[:, None, None]
        names = tuple(
            tuple(
                ("none", "mlp:1", f"full:{graph.module(graph.units[u].module).layers[graph.segment(s)][p]}")
                for p in range(ranks)
            )
            for s, u in enumerate(graph.unit_of.tolist())
        )
        graph = replace(
            graph, forward=np.repeat(graph.forward, 3, axis=0), backward=backward,
            weight=np.repeat(graph.weight, 3, axis=0), fused=backward + graph.weight,
            activation=np.ceil(4 * graph.activation * kept),
            deferred_activation=np.repeat(graph.deferred_activation, 3, axis=0), strategies=names,
        )  # fmt: skip
        graphs.append(with_memory(graph, factor))
    return graphs, experts_of(rng, modules)


@settings(20, deadline=None)
@given(seeds)
def test_found_sets_may_run(seed):
    graphs, experts = coupled(seed)
    given_sets = []
    found = search_joint(
        graphs, experts, budget_seconds=0.0, evaluations=400, seed=seed % 7,
        on_improved=lambda schedules, _: given_sets.append(list(schedules)),
    )  # fmt: skip
    assert found.lower_bound <= found.iteration_time * (1 + 1e-9)
    for schedules in (given_sets[0], found.schedules):
        joint = make_plan_set(graphs, schedules, experts, lower_bound=0.0)
        verify(*joint.plans)
    assert joint.iteration_time == pytest.approx(found.iteration_time, rel=1e-12)
    assert [t for _, t in found.history] == sorted((t for _, t in found.history), reverse=True)
    for slots in found.slots:
        assert sorted(slots.tolist()) == list(range(found.slots.shape[1]))


@settings(8, deadline=None)
@given(seeds)
def test_a_counted_search_repeats(seed):
    graphs, experts = coupled(seed)
    one, other = (
        search_joint(graphs, experts, budget_seconds=0.0, evaluations=300, workers=w).iteration_time for w in (1, 2)
    )
    assert one == other


@settings(20, deadline=None)
@given(seeds)
def test_the_walk_keeps_to_what_may_run(seed):
    """Every move keeps the conditions, and the walk's time is the simulator's."""
    graphs, experts = coupled(seed)
    t = together(graphs, experts, pairings(graphs, experts)[0])
    try:
        start = t.schedules(search(t.graph, budget_seconds=0.0, evaluations=1).schedule)
    except DoesNotFitError:
        start = one_slot_at_a_time(t)
    chain = JointChain(t, make_joint_problem(t), start, seed % 5, 0)
    before = simulate_set_compiled(graphs, start, experts).iteration_time
    assert chain.time <= before * (1 + 1e-12)
    for i in range(6):
        chain.step(i / 6, 150)
        schedules = chain.schedules()
        assert simulate_set_compiled(graphs, schedules, experts).iteration_time == pytest.approx(chain.time, rel=1e-12)
        verify(*make_plan_set(graphs, schedules, experts, lower_bound=0.0).plans)


def walk(seed: int) -> tuple[JointProblem, JointChain]:
    """A walk over a drawn set of replicas, before its first step."""
    graphs, experts = coupled(seed)
    t = together(graphs, experts, pairings(graphs, experts)[0])
    q = make_joint_problem(t)
    try:
        start = t.schedules(search(t.graph, budget_seconds=0.0, evaluations=1).schedule)
    except DoesNotFitError:
        start = one_slot_at_a_time(t)
    return q, JointChain(t, q, start, seed % 5, 0)


@settings(20, deadline=None)
@given(seeds)
def test_times_and_tails_of_the_walk_are_those_of_a_replay(seed):
    """Whatever was tried and taken back in between."""
    q, chain = walk(seed)
    for i in range(4):
        chain.step(i / 4, 100)
        s = chain.sequences
        fresh = make_joint_sequences(q, s.orders, s.lengths, s.strategy)
        time = begin_joint(q, fresh, seeded(0, 0))
        assert time == chain.values[0]
        numbers = np.concatenate(find_places(q, fresh))
        for name in ("start", "end", "place"):
            np.testing.assert_array_equal(getattr(s, name)[numbers], getattr(fresh, name)[numbers])
        np.testing.assert_allclose(s.tail[numbers], fresh.tail[numbers], rtol=1e-12)
        assert (s.start + s.tail)[numbers].max() == pytest.approx(time, rel=1e-12)


@settings(20, deadline=None)
@given(seeds)
def test_orders_that_hold_too_much_get_leaner_strategies(seed):
    """What the mean replica could hold may be too much for one: the walk makes room before it begins, or refuses."""
    graphs, experts = coupled(seed, memory=1.3)
    t = together(graphs, experts, pairings(graphs, experts)[0])
    roomy = replace(t, graph=replace(t.graph, memory_limit=np.full(t.graph.ranks, np.inf)))
    schedules = roomy.schedules(search(roomy.graph, budget_seconds=0.0, evaluations=1).schedule)
    lean = [Schedule(s.orders, c) for s, c in zip(schedules, leanest(t), strict=True)]
    try:
        found = JointChain(t, make_joint_problem(t), schedules, 0, 0).schedules()
    except ValueError:
        assert not fits_all(graphs, lean)
        return
    assert fits_all(graphs, found)
    verify(*make_plan_set(graphs, found, experts, lower_bound=0.0).plans)


def fits_all(graphs: list[OperationGraph], schedules: list[Schedule]) -> bool:
    peaks = [simulate_compiled(g, s).peak_bytes for g, s in zip(graphs, schedules, strict=True)]
    return all(np.all(peak <= g.memory_limit) for peak, g in zip(peaks, graphs, strict=True))


@settings(20, deadline=None)
@given(seeds)
def test_the_means_hold_no_more_than_the_maxima_and_no_less_than_a_replica(seed):
    graphs, experts = coupled(seed)
    t = together(graphs, experts, pairings(graphs, experts)[0])
    even = t.mean(seconds=False, held=True).graph
    assert np.all(even.activation <= t.graph.activation)
    np.testing.assert_array_equal(even.forward, t.graph.forward)
    most = np.max([g.activation[0].sum(axis=0) for g in graphs], axis=0)
    assert np.all(even.activation[0].sum(axis=0) <= np.maximum(most, 0) * (1 + 1e-9) + 1e-9)
    shorter = t.mean(seconds=True, held=False).graph
    np.testing.assert_array_equal(shorter.activation, t.graph.activation)
    for name in ("forward", "backward", "weight", "fused"):
        short, most = getattr(shorter, name), getattr(t.graph, name)
        np.testing.assert_array_equal(short[:, t.meets], most[:, t.meets])
        own = np.mean([np.where(experts.meets(g), 0.0, getattr(g, name)[0]).sum(axis=0) for g in graphs], axis=0)
        np.testing.assert_allclose(np.where(t.meets, 0.0, short[0]).sum(axis=0), own, atol=1e-9)
        assert np.all(short <= most * (1 + 1e-12))


@settings(20, deadline=None)
@given(seeds)
def test_the_fallback_fits_where_each_microbatch_does(seed):
    graphs, experts = coupled(seed, memory=1.0)
    slots = as_they_come(graphs)
    joint = make_plan_set(graphs, one_slot_at_a_time(together(graphs, experts, slots)), experts, lower_bound=0.0)
    verify(*joint.plans)


@settings(20, deadline=None)
@given(seeds)
def test_put_together_is_the_most_of_all(seed):
    """The graph of the maxima takes at least as long as the replicas under the same schedule, and holds as much."""
    graphs, experts = coupled(seed, memory=np.inf)
    t = together(graphs, experts, pairings(graphs, experts)[-1])
    found = search(t.graph, budget_seconds=0.0, evaluations=5)
    joint = simulate_set_compiled(graphs, t.schedules(found.schedule), experts)
    assert joint.iteration_time <= found.iteration_time * (1 + 1e-12)
    assert lower_bound(*graphs, experts=experts) <= joint.iteration_time * (1 + 1e-9)


def test_replicas_that_can_not_be_coupled_are_refused():
    graphs, experts = coupled(3)
    fewer = graph_of(np.random.default_rng(0), graphs[0].modules, graphs[0].ranks, 9)
    with pytest.raises(ValueError, match="equally many microbatches"):
        as_they_come([graphs[0], fewer])
    other = coupled(5)[0][0]
    with pytest.raises(CouplingError, match="replica 1 has other ranks or chunks"):
        together([graphs[0], other], experts, as_they_come([graphs[0]] * 2))
    short = [replace(g, memory_limit=g.static_bytes) for g in graphs]
    with pytest.raises(DoesNotFitError, match="no plan fits in memory"):
        search_joint(short, experts, budget_seconds=0.0, evaluations=10)


def test_strategies_that_repeat_other_collectives_never_meet():
    graphs, experts = coupled(8)
    experts = ExpertLayers.every(graphs[0].modules, ["text"])
    kept = tuple(tuple(("none",) * 3 for _ in line) for line in graphs[0].strategies)
    whole = tuple(tuple((names[2],) * 3 for names in line) for line in graphs[1].strategies)
    with pytest.raises(
        CouplingError, match="no memory strategies of the replicas repeat the same collectives"
    ) as caught:
        together([replace(graphs[0], strategies=kept), replace(graphs[1], strategies=whole), *graphs[2:]], experts,
                 as_they_come(graphs))  # fmt: skip
    assert caught.value.condition == "recompute"


def test_pairing_is_longest_first():
    assert dip_pairing(np.array([1.0, 5.0, 3.0, 5.0])).tolist() == [1, 3, 2, 0]
    assert dip_pairing(np.array([[1.0, 1.0], [0.0, 5.0]])).tolist() == [1, 0]


@settings(20, deadline=None)
@given(seeds)
def test_tails_give_up_no_trial_that_is_fast_enough(seed):
    """A change that is fast enough where nothing is given up for its tail isn't given up with tails either."""
    q, chain = walk(seed)
    s, random = chain.sequences, seeded(seed % 7, 1)
    for _ in range(150):
        limit = float(chain.values[0]) * (1 + 1e-9)
        to_the_end = tried(q, s, random.copy(), limit, tails=False)
        time = tried(q, s, random, limit, tails=True)
        assert time == to_the_end or (time == np.inf and to_the_end > limit)


def tried(q: JointProblem, s: JointSequences, random: np.ndarray, limit: float, *, tails: bool) -> float:
    """The time of one change, which is taken back; -1 if nothing can be changed so."""
    s.counts[CHANGED] = s.counts[NODES] = 0
    s.less[0] = np.inf
    after, time = change(q, s, random), -1.0
    if after >= 0.0:
        if not tails:
            after = s.less[0] = np.inf
        time = retime(q, s, after, limit)
    forget(s, False)
    take_back(q, s, 0)
    for i in range(s.counts[NODES] - 1, -1, -1):
        s.strategy[s.nodes[i]] = s.old_strategy[i]
    return float(time)
