"""Strategies in any order of bytes: a stage's last one need not be its leanest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import check_complete
from dip_megatron.core.simulate import simulate_compiled
from dip_megatron.schedulers.dip.engine import search
from tests.drawn import settings

from ...graphs import random_graph, with_memory


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1.1, 1.5]))
def test_any_order_of_strategies_ends_within_memory(seed, memory):
    graph = random_graph(seed, candidates=3, memory=np.inf)
    order = np.random.default_rng(seed).permuted(
        np.broadcast_to(np.arange(3)[:, None, None], graph.activation.shape), axis=0
    )
    graph = replace(
        graph, backward=np.take_along_axis(graph.backward, order, axis=0),
        fused=np.take_along_axis(graph.fused, order, axis=0),
        activation=np.take_along_axis(graph.activation, order, axis=0),
    )  # fmt: skip
    graph = with_memory(graph, memory)
    # More schedules than the natural order has levels, so that all of them are tried.
    result = search(graph, budget_seconds=60.0, evaluations=200)
    assert check_complete(graph, result.schedule) is None
    assert np.all(simulate_compiled(graph, result.schedule).peak_bytes <= graph.memory_limit)
