"""The exchange between replicas: never worse, the same for all, nothing lost, near what is possible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Kind, OperationGraph
from dip_megatron.describe.cost import Corrections, Line
from dip_megatron.planner.balance import Work, assign, microbatch_work
from tests.drawn import settings
from tests.graphs import random_graph


def drawn(seed: int, replicas: int, each: int, ranks: int, spread: float) -> Work:
    random = np.random.default_rng(seed)
    size = random.lognormal(0.0, spread, (replicas * each, 1))
    seconds = size * random.uniform(0.5, 1.5, (replicas * each, ranks))
    return Work(seconds, 1e6 * seconds * random.uniform(0.5, 2.0), np.repeat(np.arange(replicas), each), replicas)


works = st.builds(
    drawn, st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 8), st.integers(1, 4), st.floats(0.0, 2.0)
)


@settings(max_examples=150, deadline=None)
@given(works, st.sampled_from(["swap", "free"]))
def test_an_exchange_is_never_worse_and_loses_nothing(work: Work, mode):
    found = assign(work, mode, goal=1.0)
    assert found.after.max() <= found.before.max() * (1 + 1e-12)
    np.testing.assert_allclose(found.after, work.cost(found.replica))
    assert found.gain >= 1 - 1e-12
    assert np.array_equal(found.moved, found.replica != work.replica)
    before, after = (np.bincount(r, minlength=work.replicas) for r in (work.replica, found.replica))
    assert after.sum() == before.sum()
    assert after.min() >= 1
    if mode == "swap":
        assert np.array_equal(before, after)
    fullest = work.sums(work.held, work.replica).max()
    assert work.sums(work.held, found.replica).max() <= fullest * (1 + 1e-8)


@settings(max_examples=50, deadline=None)
@given(works)
def test_the_same_numbers_give_the_same_exchange(work: Work):
    again = Work(work.seconds.copy(), work.held.copy(), work.replica.copy(), work.replicas)
    assert assign(work).digest() == assign(again).digest()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 3), st.integers(1, 3))
def test_small_cases_are_near_the_best_there_is(seed, each, ranks):
    """Against every way to share out the microbatches of two replicas, memory aside."""
    work = drawn(seed, 2, each, ranks, 1.0)
    work = Work(work.seconds, np.zeros_like(work.seconds), work.replica, 2)
    best = np.inf
    for bits in range(1 << len(work.seconds)):
        place = np.array([bits >> m & 1 for m in range(len(work.seconds))])
        if place.sum() == each:
            best = min(best, work.cost(place).max())
    assert assign(work, goal=1.0).after.max() <= best * 1.35


def test_many_replicas_end_together():
    work = drawn(3, 64, 16, 4, 0.6)
    found = assign(work)
    assert found.before.max() / found.before.mean() > 1.2
    assert found.after.max() / found.after.mean() <= 1.002
    assert found.moved.mean() < 0.5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_work_is_what_the_stages_of_a_microbatch_take(seed):
    graph: OperationGraph = random_graph(seed, memory=np.inf)
    seconds, held = microbatch_work(graph)
    backward = np.where(graph.has_weight, graph.fused[0], graph.backward[0])
    total = (graph.forward[0] + np.where(graph.has_backward, backward, 0.0)).sum(axis=0)
    np.testing.assert_allclose(seconds.sum(axis=0), total)
    np.testing.assert_allclose(held.sum(axis=0), graph.activation[0].sum(axis=0))
    assert len(seconds) == 1 + max(u.microbatch for u in graph.units)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_measured_times_change_what_moves(seed, slower):
    """Backwards that take longer than the model says: work is then what was measured."""
    graph = random_graph(seed, memory=np.inf)
    lines = tuple(
        Line(m.name, k, Kind.BW, (0.0,) * graph.ranks, (float(slower),) * graph.ranks)
        for m in graph.modules
        for k in range(m.segments)
    )
    modelled, _ = microbatch_work(graph)
    corrected, _ = microbatch_work(Corrections(lines).apply(graph))
    backward = np.where(graph.has_backward & graph.has_weight, graph.fused[0], 0.0).sum(axis=0)
    np.testing.assert_allclose(corrected.sum(axis=0) - modelled.sum(axis=0), (slower - 1) * backward)


def test_microbatches_go_where_measured_times_send_them():
    """Two kinds of work, of which one takes four times what the model says: replicas of equal modelled work don't end
    together, and the exchange that knows the measured times mends it."""
    heavy, light = [1.0, 1.0], [0.5, 2.0]  # forwards and backwards
    kinds = np.array([heavy] * 4 + [light] * 4)
    place = np.repeat([0, 1], 4)
    modelled = kinds @ [1.0, 0.5]
    measured = kinds @ [1.0, 4.0]
    before, after = (
        assign(Work(seconds[:, None], np.zeros((8, 1)), place, 2), goal=1.0) for seconds in (modelled, measured)
    )
    true = Work(measured[:, None], np.zeros((8, 1)), place, 2)
    assert true.cost(after.replica).max() < true.cost(before.replica).max()
    assert true.cost(after.replica).max() == pytest.approx(measured.sum() / 2)


def test_what_must_stay_stays():
    work = drawn(5, 6, 8, 2, 1.0)
    stays = np.arange(48) % 3 == 0
    for mode in ("swap", "free"):
        found = assign(Work(work.seconds, work.held, work.replica, 6, stays), mode, goal=1.0)
        assert found.moved.any()
        assert not found.moved[stays].any()


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ValueError, match="must be"):
        Work(np.ones((2, 3)), np.ones((2, 2)), np.array([0, 1]), 2)
    with pytest.raises(ValueError, match="finite"):
        Work(np.full((2, 3), np.nan), np.ones((2, 3)), np.array([0, 1]), 2)
    with pytest.raises(ValueError, match="one a microbatch"):
        Work(np.ones((2, 3)), np.ones((2, 3)), np.array([0, 1]), 2, np.zeros(3, dtype=np.bool_))
    with pytest.raises(ValueError, match="replica must be 0 to 1"):
        Work(np.ones((2, 3)), np.ones((2, 3)), np.array([0, 2]), 2)
