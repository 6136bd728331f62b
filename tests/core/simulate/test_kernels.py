"""The compiled simulator against the reference, exactly."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import OperationGraph, Schedule
from dip_megatron.core.simulate import DeadlockError, Timeline, simulate, simulate_compiled
from dip_megatron.schedulers.dip.dispatch import dispatch
from dip_megatron.schedulers.dip.incumbent import listed
from dip_megatron.schedulers.dip.keys import make_keys
from dip_megatron.schedulers.dip.problem import make_problem
from dip_megatron.schedulers.dip.work import make_work
from tests.drawn import settings
from tests.graphs import random_graph, small_graphs


def drawn_schedule(graph: OperationGraph, seed: int) -> Schedule:
    """A valid schedule with random priorities, strategies and choices of split or fused backwards."""
    random = np.random.default_rng(seed)
    q = make_problem(graph)
    keys, work = make_keys(q, split=True), make_work(q)
    keys.order_forward[:] = random.permutation(q.groups)
    keys.order_backward[:] = random.permutation(q.groups)
    keys.shift_forward[:] = random.normal(size=graph.virtual_microbatches)
    keys.offset[:] = 3.0 * random.normal(size=graph.ranks)
    keys.split[:] &= random.random(len(keys.split)) < 0.6
    assert np.isfinite(dispatch(q, keys, work, np.inf))
    schedule = listed(q, work)
    return Schedule(schedule.orders, random.integers(0, graph.candidates, schedule.strategy.shape).astype(np.int8))


@settings(max_examples=150, deadline=None)
@given(small_graphs(), st.integers(0, 2**32 - 1))
def test_equals_the_reference_bit_for_bit(graph: OperationGraph, seed: int) -> None:
    schedule = drawn_schedule(graph, seed)
    slow, fast = simulate(graph, schedule), simulate_compiled(graph, schedule)
    assert fast.iteration_time == slow.iteration_time
    assert np.array_equal(fast.peak_bytes, slow.peak_bytes)
    for p in range(graph.ranks):
        assert np.array_equal(fast.start[p], slow.start[p])
        assert np.array_equal(fast.end[p], slow.end[p])


@settings(max_examples=100, deadline=None)
@given(small_graphs(), st.integers(0, 2**32 - 1))
def test_deadlocks_like_the_reference(graph: OperationGraph, seed: int) -> None:
    schedule = drawn_schedule(graph, seed)
    random = np.random.default_rng(seed)
    shuffled = Schedule(tuple(random.permutation(o).astype(np.int32) for o in schedule.orders), schedule.strategy)
    assert outcome(simulate, graph, shuffled) == outcome(simulate_compiled, graph, shuffled)


def outcome(
    simulator: Callable[[OperationGraph, Schedule], Timeline], graph: OperationGraph, schedule: Schedule
) -> float | str:
    """Iteration time, or the text of the deadlock."""
    try:
        return simulator(graph, schedule).iteration_time
    except DeadlockError as error:
        return str(error)


def test_reports_where_each_rank_stands() -> None:
    graph = random_graph(3, ranks=2, memory=float("inf"))
    schedule = drawn_schedule(graph, 0)
    backwards = Schedule(tuple(o[::-1].copy() for o in schedule.orders), schedule.strategy)
    with pytest.raises(DeadlockError, match=r"rank 0 at .*, rank 1 at "):
        simulate_compiled(graph, backwards)
