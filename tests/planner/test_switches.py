"""The configuration's switches turn each strategy off in what training plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dip_megatron.config import DipConfig
from dip_megatron.core import Kind, check_complete
from dip_megatron.core.experts import NO_EXPERTS
from dip_megatron.describe.cost import load_cluster
from dip_megatron.describe.model import even_partition, load_model
from dip_megatron.describe.workload import Microbatch
from dip_megatron.planner.model_graphs import ModelGraphs
from dip_megatron.planner.searchers import live_effort, searcher_of
from dip_megatron.schedulers.dip.options import SearchOptions
from dip_megatron.schedulers.registry import find_schedule

MODEL = load_model("vlm-s").with_parallel(pp=2)
BATCH = tuple(Microbatch(4000, (169,) * n) for n in (8, 0, 12))


def graphs_of(config: DipConfig):
    """As DipSession makes them."""
    return ModelGraphs(
        MODEL, replace(load_cluster("h100"), host_bandwidth=100e9), even_partition(MODEL), None, None,
        config.recompute, config.offload,
    )  # fmt: skip


def graph_of(config: DipConfig):
    """With a limit that not all activations fit."""
    graph = graphs_of(config).build(BATCH, forward_only=False)
    lean = graph.activation[-1].sum(axis=0)
    limit = graph.static_bytes + lean + 0.5 * (graph.activation[0].sum(axis=0) - lean)
    return replace(graph, memory_limit=limit)


def kinds_of(config: DipConfig, graph):
    searcher = searcher_of(find_schedule(config.schedule), graphs_of(config), live_effort(config))
    (schedule,) = searcher([graph], NO_EXPERTS, 0.3, lambda _: None).schedules
    names = {
        part.split(":")[0]
        for s in range(graph.virtual_microbatches)
        for p in range(graph.ranks)
        for part in graph.strategy_name(int(schedule.strategy[s, p]), s, p).split("+")
    }
    return {int(code) // graph.virtual_microbatches for order in schedule.orders for code in order}, names


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_only_strategies_that_are_on_are_offered(recompute, offload):
    graph = graph_of(DipConfig(schedule="dynamic", recompute=recompute, offload=offload))
    offered = {part.split(":")[0] for row in graph.strategies for names in row for n in names for part in n.split("+")}
    assert ("full" in offered) == recompute
    assert any(name.startswith("offload") for name in offered) == offload
    assert "none" in offered


def test_a_search_may_do_what_is_on_and_does_nothing_that_is_off():
    on = DipConfig(schedule="dynamic")
    assert live_effort(on).options == SearchOptions(split_backward=True, recompute=True, offload=False)
    _, names = kinds_of(on, graph_of(on))
    assert names & {"activation", "selective", "mlp", "full"}  # not all activations fit
    assert not any(name.startswith("offload") for name in names)
    off = DipConfig(schedule="dynamic", split_backward=False, recompute=False)
    roomy = replace(graph_of(off), memory_limit=np.full(2, np.inf))
    assert kinds_of(off, roomy) == ({int(Kind.F), int(Kind.BW)}, {"none"})


def test_a_thrifty_search_ends_when_nothing_better_comes():
    on = DipConfig(schedule="dynamic")
    graph = replace(graph_of(on), memory_limit=np.full(2, np.inf))
    searcher = searcher_of(find_schedule(on.schedule), graphs_of(on), live_effort(on, thrifty=True))
    found = searcher([graph], NO_EXPERTS, 3600.0, lambda _: None)
    assert check_complete(graph, found.schedules[0]) is None
    assert found.statistics is not None
    assert found.statistics.evaluations < 200_000
