"""The configuration's switches turn each strategy off in what training plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dip_megatron.config import DipConfig
from dip_megatron.core import Kind, check_complete
from dip_megatron.describe.cost import load_cluster
from dip_megatron.describe.model import even_partition, load_model
from dip_megatron.describe.workload import Microbatch
from dip_megatron.planner.live import ModelGraphs
from dip_megatron.planner.searchers import DipSearcher, make_searcher

MODEL = load_model("vlm-s").with_parallel(pp=2)
BATCH = tuple(Microbatch(4000, (169,) * n) for n in (8, 0, 12))


def graph_of(config: DipConfig):
    """As DipSession makes it, with a limit that not all activations fit."""
    graphs = ModelGraphs(
        MODEL, replace(load_cluster("h100"), host_bandwidth=100e9), even_partition(MODEL), None, None,
        config.recompute, config.offload,
    )  # fmt: skip
    graph = graphs.build(BATCH, forward_only=False)
    lean = graph.activation[-1].sum(axis=0)
    limit = graph.static_bytes + lean + 0.5 * (graph.activation[0].sum(axis=0) - lean)
    return replace(graph, memory_limit=limit)


def kinds_of(config: DipConfig, graph):
    schedule, _ = make_searcher(config)(graph, 0.3, lambda _: None)
    names = {
        part.split(":")[0]
        for s in range(graph.rows)
        for p in range(graph.ranks)
        for part in graph.strategy_name(int(schedule.strategy[s, p]), s, p).split("+")
    }
    return {int(code) // graph.rows for order in schedule.orders for code in order}, names


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_only_strategies_that_are_on_are_offered(recompute, offload):
    graph = graph_of(DipConfig(schedule="dynamic", recompute=recompute, offload=offload))
    offered = {part.split(":")[0] for row in graph.strategies for names in row for n in names for part in n.split("+")}
    assert ("full" in offered) == recompute
    assert ("offload" in offered) == offload
    assert "none" in offered


def test_a_search_may_do_what_is_on_and_does_nothing_that_is_off():
    on = DipConfig(schedule="dynamic")
    assert make_searcher(on) == DipSearcher(split_backward=True, recompute=True, offload=False)
    _, names = kinds_of(on, graph_of(on))
    assert names & {"activation", "selective", "mlp", "full"}  # not all activations fit
    assert "offload" not in names
    off = DipConfig(schedule="dynamic", split_backward=False, recompute=False)
    roomy = replace(graph_of(off), memory_limit=np.full(2, np.inf))
    assert kinds_of(off, roomy) == ({int(Kind.F), int(Kind.BW)}, {"none"})


def test_a_thrifty_search_ends_when_nothing_better_comes():
    on = DipConfig(schedule="dynamic")
    graph = replace(graph_of(on), memory_limit=np.full(2, np.inf))
    schedule, statistics = make_searcher(on, thrifty=True)(graph, 30.0, lambda _: None)
    assert check_complete(graph, schedule) is None
    assert statistics.seconds < 15.0
    assert statistics.evaluations < 200_000
