"""Layers with experts: what they cost, what a rank holds of them, and how files and chunks tell of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dip_megatron.describe.cost import CostModel, LayerRun, build_graph, load_cluster
from dip_megatron.describe.cost.mlp import experts_cost
from dip_megatron.describe.cost.operators import Operators
from dip_megatron.describe.cost.static import run_bytes
from dip_megatron.describe.files import ConfigurationError
from dip_megatron.describe.model import (
    Experts,
    LanguageHead,
    LayerKind,
    ModelError,
    ModuleShape,
    MultimodalModel,
    Parallel,
    TokenEmbedding,
    TransformerLayer,
    even_partition,
    load_model,
)
from dip_megatron.describe.workload import Microbatch
from tests.describe.cost.test_costs import IDEAL

H100 = load_cluster("h100")
EXPERTS = Experts(count=16, active=4, ffn=512, dense_first=1)
LAYER = TransformerLayer(1024, 4096, 16, 4, gated=True, causal=True, experts=EXPERTS)
TOKENS = np.array([4096.0])
ALONE = Parallel()


def model(parallel: Parallel, experts: Experts | None = EXPERTS, layers: int = 4) -> MultimodalModel:
    module = ModuleShape("language", "text", layers, replace(LAYER, experts=experts))
    return MultimodalModel("moe", (module,), parallel)


def cost(parallel: Parallel = ALONE, cluster=H100, **experts):
    layer = replace(LAYER, experts=replace(EXPERTS, **experts))
    return experts_cost(layer, parallel, Operators(cluster, parallel.tp), TOKENS)


def test_products_are_those_of_the_experts_a_token_goes_to():
    products = 3 * 2 * 4096 * 4 * 1024 * 512 / 1e15  # three matrices; 1e15 FLOP/s and nothing else takes time
    router = 2 * 4096 * 1024 * 16 / 1e15
    even = cost(cluster=IDEAL, imbalance=1.0)
    assert even.forward[0] == pytest.approx(products + router)
    assert even.backward[0] == pytest.approx(products + 2 * router)  # the router's weight gradient is in the backward
    assert even.weight[0] == pytest.approx(products)
    assert cost(cluster=IDEAL, imbalance=1.25).weight[0] == pytest.approx(1.25 * products)
    shared = cost(cluster=IDEAL, imbalance=1.0, shared_ffn=512)
    assert shared.weight[0] == pytest.approx(products * 5 / 4)


def test_spreading_experts_moves_tokens_and_holds_fewer_weights():
    """Over four replicas a rank computes as much as before, on fewer matrices, and waits for the exchange."""
    alone, spread = cost(Parallel(dp=8)), cost(Parallel(dp=8, ep=4))
    far = cost(Parallel(dp=64, ep=16))
    assert alone.forward[0] < spread.forward[0] < far.forward[0]
    exchange = 2 * 2 * 1024 * 4096 * 4 * 1.15 * 3 / 4
    assert spread.forward[0] - alone.forward[0] > exchange / H100.node_bandwidth
    assert spread.weight[0] < alone.weight[0]
    assert (spread.kept == alone.kept).all()


def test_within_a_replica_each_rank_of_a_stage_sends_its_part_of_the_sequence():
    whole, part = cost(Parallel(dp=4, ep=4)), cost(Parallel(tp=4, ep=4, etp=1))
    assert Parallel(tp=4, ep=4, etp=1).coupled == 1
    assert part.weight[0] < whole.weight[0]
    assert part.kept[0] == pytest.approx(whole.kept[0] / 4)


def test_the_host_waits_in_the_forward_alone():
    waits = replace(H100, host_wait=1e-3)
    before, after = cost(), cost(cluster=waits)
    assert after.forward[0] - before.forward[0] == pytest.approx(1e-3 - H100.host_wait)
    assert after.backward[0] == before.backward[0]


def test_recomputing_experts_repeats_the_exchange_and_their_activation_does_not():
    pricer = CostModel(model(Parallel(pp=1, dp=4, ep=4)), H100)
    sizes = pricer.mixed_sizes([Microbatch(4096)])["language"]
    layer = pricer.layer("language", sizes, LayerKind(experts=True))
    by_name = {s.name: i for i, s in enumerate(pricer.strategies)}
    extra = layer.backward[:, 0] - layer.backward[0, 0]
    saved = layer.activation[0, 0] - layer.activation[:, 0]
    whole = experts_cost(LAYER, Parallel(dp=4, ep=4), Operators(H100, 1), sizes.tokens)
    assert extra[by_name["mlp"]] == pytest.approx(whole.forward[0])
    assert extra[by_name["activation"]] == pytest.approx(whole.activate[0])
    assert saved[by_name["mlp"]] == pytest.approx(whole.kept[0])
    assert saved[by_name["activation"]] == pytest.approx(whole.activated[0])


def test_chunks_cost_what_their_layers_do_wherever_they_stand():
    described = model(Parallel(pp=2))
    pricer = CostModel(described, H100, strategies=["none"])
    sizes = pricer.mixed_sizes([Microbatch(4096)])
    dense, expert = (pricer.layer("language", sizes["language"], LayerKind(experts=e)) for e in (False, True))
    first, second = (pricer.chunk_cost((LayerRun("language", 2, first=f),), sizes) for f in (0, 2))
    assert first.forward[0, 0] == pytest.approx(dense.forward[0, 0] + expert.forward[0, 0])
    assert second.forward[0, 0] == pytest.approx(2 * expert.forward[0, 0])
    graph = build_graph(described, H100, even_partition(described), [Microbatch(4096)])
    assert graph.forward[0, 0, 0] < graph.forward[0, 0, 1]


def test_state_is_split_over_the_ranks_that_share_experts():
    def held(parallel: Parallel, layers: range) -> float:
        described = model(parallel)
        return run_bytes(described, H100, described.modules[0], layers, False, False).parameters

    experts = 16 * 3 * 1024 * 512 * 2
    dense, one = held(Parallel(dp=4), range(1)), held(Parallel(dp=4), range(1, 2))
    assert one - experts == pytest.approx(dense - 2 * (3 * 1024 * 4096 - 1024 * 16))
    assert held(Parallel(dp=4, ep=4), range(1, 2)) == pytest.approx(one - experts * 3 / 4)
    described = model(Parallel(dp=4, ep=4))
    spread = run_bytes(described, H100, described.modules[0], range(1, 2), False, False)
    assert spread.optimizer * 4 == pytest.approx(12 * (one - experts) / 2 + 4 * 12 * (experts / 4) / 2)
    assert described.parameters == pytest.approx((dense + 3 * one) / 2)


@pytest.mark.parametrize(
    ("parallel", "coupled"),
    [({}, 1), ({"tp": 2, "ep": 2, "etp": 1}, 1), ({"tp": 2, "ep": 4, "etp": 1}, 2), ({"tp": 2, "ep": 8}, 8),
     ({"cp": 2, "ep": 4}, 2), ({"tp": 2, "cp": 2, "ep": 4, "etp": 1}, 1)],
)  # fmt: skip
def test_replicas_that_share_experts_are_counted(parallel, coupled):
    assert Parallel(**parallel).coupled == coupled


def test_a_file_tells_of_experts(tmp_path: Path):
    text = """
name: moe
parallel: {pp: 2, ep: EP}
modules:
  language:
    input: text
    layers: 4
    layer:
      {hidden: 64, ffn: 128, heads: 4, kv_groups: 4, experts: {count: 8, active: 2, ffn: 32, pattern: [true, false]}}
    stem: {kind: token_embedding, vocabulary: 128}
    head: {kind: language_head, vocabulary: 128}
"""
    path = tmp_path / "moe.yaml"
    path.write_text(text.replace("EP", "4"))
    shape = load_model(path).modules[0]
    assert [kind.experts for kind in shape.kinds] == [True, False, True, False]
    path.write_text(text.replace("EP", "3"))
    with pytest.raises(ConfigurationError, match=r"language.layer.experts.count: 8 can't be split over ep 3"):
        load_model(path)
    path.write_text(text.replace("EP", "1").replace("active: 2", "active: 9"))
    with pytest.raises(ConfigurationError, match=r"layer.experts.active: a token can't go to 9 of 8 experts"):
        load_model(path)


def test_impossible_experts_are_refused():
    with pytest.raises(ValueError, match="count: must be at least 1"):
        Experts(0, 1, 8)
    with pytest.raises(ModelError, match=r"experts.ffn: 512 can't be split over etp 3"):
        model(Parallel(ep=1, etp=3))


def test_multi_token_prediction_goes_with_the_head():
    """A depth: two hidden states to one, a layer like the last, and the head once more; a copy of the embedding."""
    module = ModuleShape(
        "language", "text", 4, replace(LAYER, experts=None), TokenEmbedding(32000), LanguageHead(32000)
    )
    plain, deeper = (MultimodalModel("gpt", (replace(module, mtp=n),)) for n in (0, 2))
    assert deeper.parameters - plain.parameters == 2 * (module.layer.parameters + 2 * 1024**2)
    pricers = [CostModel(m, H100, strategies=["none"]) for m in (plain, deeper)]
    sizes = pricers[0].mixed_sizes([Microbatch(4096)])["language"]
    one, three = (pricer.head("language", sizes) for pricer in pricers)
    layer = pricers[0].layer("language", sizes)
    assert three.forward[0] > 3 * one.forward[0] + 2 * layer.forward[0, 0]
    assert three.activation[0] > 3 * one.activation[0] + 2 * layer.activation[0, 0]
    assert three.forward[0] < 3 * (one.forward[0] + layer.forward[0, 0])
    held = [run_bytes(m, H100, m.modules[0], range(0), False, True).parameters for m in (plain, deeper)]
    assert held[1] - held[0] == 2 * (deeper.parameters - plain.parameters + 32000 * 1024)
