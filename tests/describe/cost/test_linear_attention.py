"""Gated delta nets, output gates and sliding windows: what they cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dip_megatron.describe.cost import CostModel, load_cluster, whole_sizes
from dip_megatron.describe.model import (
    GatedDeltaNet,
    LanguageHead,
    LayerKind,
    ModelError,
    ModuleShape,
    MultimodalModel,
    Parallel,
    TransformerLayer,
)
from dip_megatron.describe.workload import Microbatch
from tests.describe.cost.test_costs import IDEAL

H100 = load_cluster("h100")
NET = GatedDeltaNet(key_heads=4, value_heads=8)
LAYER = TransformerLayer(
    1024, 4096, 8, 2, head_dim=256, gated=True, causal=True, full_attention_every=4, linear_attention=NET
)
LINEAR, FULL = LayerKind(full_attention=False), LayerKind()


def priced(
    kind: LayerKind, tokens: int = 8192, layer: TransformerLayer = LAYER, cluster=IDEAL, tp: int = 1, cp: int = 1
):  # fmt: skip
    module = ModuleShape("language", "text", 4, layer, head=LanguageHead(1000))
    model = MultimodalModel("delta", (module,), Parallel(tp=tp, cp=cp))
    sizes = whole_sizes(module, [Microbatch(tokens)])
    return CostModel(model, cluster).layer("language", sizes, kind)


def test_on_ideal_hardware_only_the_products_count():
    """2 FLOPs a weight and token; the rule's own by the chunk: three products with the state, five with neighbours."""
    cost = priced(LINEAR)
    weights = NET.parameters(1024) - 4 * (2 * 512 + 1024) + 3 * 1024 * 4096
    rule = 8 * (6 * 128**2 + 2 * 64 * 5 * 128)
    assert cost.forward[0, 0] == pytest.approx(8192 * (2 * weights + rule) / 1e15)
    assert cost.backward[0, 0] == pytest.approx(8192 * (2 * weights + 3 * rule) / 1e15)
    assert cost.weight[0] == pytest.approx(8192 * 2 * weights / 1e15)


def test_a_long_sequence_costs_in_proportion_to_its_length():
    linear = [priced(LINEAR, n, cluster=H100).forward[0, 0] for n in (65536, 131072)]
    full = [priced(FULL, n, cluster=H100).forward[0, 0] for n in (65536, 131072)]
    assert linear[1] == pytest.approx(2 * linear[0], rel=0.02)
    assert full[1] > 2.5 * full[0]
    assert full[1] > 2 * linear[1]


def test_tensor_parallel_ranks_share_heads_and_bytes():
    alone, shared = priced(LINEAR), priced(LINEAR, tp=4)
    assert shared.forward[0, 0] == pytest.approx(alone.forward[0, 0] / 4)
    assert shared.activation[0, 0] == pytest.approx(alone.activation[0, 0] / 4)
    full = [i for i in range(len(alone.activation)) if alone.activation[i, 0] < alone.activation[0, 0]]
    assert full  # some strategy keeps less
    assert np.all(alone.activation >= 0)


def test_context_parallel_ranks_exchange_shares_for_heads_and_back():
    """Queries, keys, values, gates and two numbers a head there, the core's outputs back; half of it is at home."""
    slow = replace(IDEAL, node_bandwidth=1e9)
    alone, shared = priced(LINEAR, 4096, cluster=slow), priced(LINEAR, 8192, cluster=slow, cp=2)
    numbers = 4096 * (2 * 512 + 2 * 1024 + 2 * 8 + 1024)
    for name in ("forward", "backward"):
        assert (getattr(shared, name) - getattr(alone, name))[0, 0] == pytest.approx(2 * numbers / 2 / 1e9)
    with pytest.raises(ModelError, match=r"linear_attention: 4 and 8 heads can't be split over tp 1 and cp 8"):
        priced(LINEAR, cp=8)


def test_an_output_gate_costs_a_projection_of_the_queries_width():
    plain, gated = priced(FULL), priced(FULL, layer=replace(LAYER, output_gate=True))
    projection = 2 * 8192 * 1024 * 2048 / 1e15
    for name in ("forward", "backward"):
        assert (getattr(gated, name) - getattr(plain, name))[0, 0] == pytest.approx(projection)
    assert (gated.weight - plain.weight)[0] == pytest.approx(projection)
    assert (gated.activation - plain.activation)[0, 0] == pytest.approx(2 * 2 * 2048 * 8192)


def test_causal_windows_slide():
    """Each token attends to so many before it, and the first ones to fewer."""
    module = ModuleShape("language", "text", 6, TransformerLayer(64, 256, 4, 4, causal=True, window=8))
    for length in (1, 5, 8, 9, 40):
        pairs = float(whole_sizes(module, [Microbatch(length)]).window_pairs[0]) / 2
        exact = sum(min(i + 0.5, 8) for i in range(length))  # a token and itself count half, as without windows
        assert pairs == pytest.approx(exact)


def test_windows_and_linear_attention_exclude_each_other():
    with pytest.raises(ModelError, match="leave one out"):
        replace(LAYER, window=64)
