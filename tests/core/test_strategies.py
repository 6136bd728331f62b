"""A memory strategy is one entry: one from outside is priced, switched off, and spelled like those within."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from dip_megatron.core.strategies import (
    LayerStrategy,
    StrategyError,
    allowed_strategies,
    format_strategy,
    known_strategies,
    parse_strategy,
    register,
    strategy_names,
    unregister,
)
from dip_megatron.describe.cost import CostModel, load_cluster
from dip_megatron.describe.cost.sizes import whole_sizes
from dip_megatron.describe.model import even_partition, load_model
from dip_megatron.describe.workload import Microbatch
from dip_megatron.planner.model_graphs import ModelGraphs
from tests.outside_strategy import OUTSIDE, price, registered

MODEL = load_model("vlm-s").with_parallel(pp=2)
CLUSTER = load_cluster("h100")
BATCH = tuple(Microbatch(4000, (169,) * n) for n in (8, 0, 12))


def offered(graphs: ModelGraphs) -> set[str]:
    graph = graphs.build(BATCH, forward_only=False)
    texts = {name for line in graph.strategies for names in line for name in names}
    return {run.split(":")[0] for text in texts for run in text.split("+")}


def test_every_entry_resolves_to_what_runs_it():
    pytest.importorskip("megatron.core")
    assert all(callable(s.runner()) for s in known_strategies() if s.name != "none")


def test_an_entry_from_outside_is_priced():
    with registered():
        sizes = whole_sizes(MODEL.module("language"), BATCH)
        layer = CostModel(MODEL, CLUSTER).layer("language", sizes)
        none, ours = (strategy_names().index(name) for name in ("none", "outside"))
        assert (layer.activation[ours] == 0.5 * layer.activation[none]).all()
        assert (layer.backward[ours] == layer.backward[none] + 0.5 * layer.forward[none]).all()
        assert format_strategy(["outside", "none"]) == "outside:1"
        assert parse_strategy("full:1+outside:1", 3) == ("full", "outside", "none")


def test_an_entry_from_outside_is_offered_unless_its_switch_is_off():
    with registered():
        graphs = ModelGraphs(MODEL, CLUSTER, even_partition(MODEL))
        assert "outside" in offered(graphs)
        assert not offered(replace(graphs, recompute=False)) & {"outside", "full"}
        assert "outside" in allowed_strategies(recompute=True, offload=False)


def test_an_entry_travels_to_the_processes_that_plan():
    with registered():
        data = pickle.dumps(ModelGraphs(MODEL, CLUSTER, even_partition(MODEL)))
    assert "outside" not in strategy_names()
    assert "outside" in offered(pickle.loads(data))
    unregister("outside")


def test_what_cannot_be_an_entry_is_refused():
    register(known_strategies()[0])  # the same again
    with pytest.raises(StrategyError, match="'full' already"):
        register(LayerStrategy(name="full", price=price))
    with pytest.raises(StrategyError, match="lower-case"):
        register(replace(OUTSIDE, name="Half:1"))
    assert "Half:1" not in strategy_names()
