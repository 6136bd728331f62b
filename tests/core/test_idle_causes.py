"""Idle time is told apart: waiting for a stage on another rank, or anything else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dip_megatron.core import OperationGraph, Schedule
from dip_megatron.core.idle_causes import idle_before
from dip_megatron.core.simulate import simulate
from dip_megatron.schedulers.greedy import greedy
from tests.graphs import random_graph

TIMES = ("forward", "backward", "weight", "fused")


def case(seed: int) -> tuple[OperationGraph, Schedule]:
    graph = random_graph(seed, ranks=2 + seed % 3, microbatches=3, candidates=1)
    graph = replace(graph, memory_limit=np.full(graph.ranks, np.inf), transfer=np.zeros_like(graph.transfer))
    return graph, greedy(graph)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_a_rank_that_starts_as_soon_as_it_can_only_waits(seed: int) -> None:
    graph, schedule = case(seed)
    timeline = simulate(graph, schedule)
    for rank, idle in enumerate(idle_before(graph, schedule.orders, timeline.start, timeline.end)):
        assert np.allclose(idle.between, 0.0)
        busy = float((timeline.end[rank] - timeline.start[rank]).sum())
        assert np.isclose(idle.waiting.sum() + busy, timeline.end[rank][-1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-4, 1e-1))
def test_what_passes_before_each_operation_is_found(seed: int, overhead: float) -> None:
    graph, schedule = case(seed)
    slower = replace(graph, **{name: getattr(graph, name) + overhead for name in TIMES})
    timeline = simulate(slower, schedule)
    start = [s + overhead for s in timeline.start]
    for idle in idle_before(graph, schedule.orders, start, timeline.end):
        assert np.allclose(idle.between, overhead)
        assert np.all(idle.waiting >= 0.0)


def test_an_evaluation_has_forwards_alone() -> None:
    graph, schedule = case(3)
    orders = tuple(order[order < graph.virtual_microbatches] for order in schedule.orders)
    start = [np.arange(len(o), dtype=float) for o in orders]
    found = idle_before(graph, orders, start, [s + 1.0 for s in start])
    assert all(np.allclose(idle.waiting + idle.between, 0.0) for idle in found)
    assert all(len(i.waiting) == 0 for i in idle_before(graph, [o[:0] for o in orders], [s[:0] for s in start],
                                                       [s[:0] for s in start]))  # fmt: skip
