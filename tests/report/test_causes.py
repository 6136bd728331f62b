"""Why ranks are idle: the causes add up, and each is what it says."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given

from dip_megatron.core import OperationGraph, Schedule
from dip_megatron.core.simulate import simulate
from dip_megatron.report.causes import idle_causes
from dip_megatron.schedulers.greedy import greedy
from tests.graphs import random_graph, small_graphs


@given(small_graphs(memory=np.inf))
def test_causes_add_up_to_the_iteration(graph: OperationGraph) -> None:
    schedule = greedy(graph)
    timeline = simulate(graph, schedule)
    for one in idle_causes(graph, schedule, timeline.start, timeline.end, straggling=0.5):
        assert min(astuple(one)) >= -1e-12
        assert sum(astuple(one)) == pytest.approx(timeline.iteration_time + 0.5)
        assert one.straggling == 0.5


def one_microbatch(transfer: float) -> tuple[OperationGraph, Schedule]:
    graph = random_graph(3, ranks=2, microbatches=1, candidates=1, memory=np.inf, max_units=1, max_segments=1)
    graph = graph.changed(lambda a: np.ones_like(a), transfer=np.full(graph.virtual_microbatches, transfer))
    return graph, greedy(graph)


def test_a_transfer_is_communication_and_the_wait_for_a_stage_is_not() -> None:
    found = []
    for transfer in (0.0, 0.25):
        graph, schedule = one_microbatch(transfer)
        timeline = simulate(graph, schedule)
        found.append(idle_causes(graph, schedule, timeline.start, timeline.end))
    without, with_transfer = found
    assert all(one.communication == pytest.approx(0.0) for one in without)
    assert sum(one.communication for one in with_transfer) > 0
    for one in without:  # equal work: nothing is imbalance
        assert one.imbalance == pytest.approx(0.0)
        assert one.fill + one.dependency > 0


def test_less_work_than_the_busiest_is_imbalance() -> None:
    graph, schedule = one_microbatch(0.0)
    half = graph.changed(lambda a: a * np.array([1.0, 0.25]))
    timeline = simulate(half, schedule)
    busy, idle = idle_causes(half, schedule, timeline.start, timeline.end)
    assert busy.imbalance == pytest.approx(0.0)
    assert idle.imbalance == pytest.approx(busy.busy - idle.busy)
