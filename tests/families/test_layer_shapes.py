"""Layers in the planner's words, from Megatron's configs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dip_megatron.describe.model import GatedDeltaNet
from dip_megatron.families.describe import layer_shape

CONFIG = {
    "num_layers": 8, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2,
    "kv_channels": 16, "gated_linear_unit": True,
}  # fmt: skip
NETS = {
    "experimental_attention_variant": "gated_delta_net", "attention_output_gate": True, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
}  # fmt: skip


def shape(**more: Any) -> Any:
    return layer_shape(SimpleNamespace(**CONFIG, **more), causal=True, spec=(False,) * 8)


@pytest.mark.parametrize("pattern", [4, [1, 1, 1, 0] * 2])
def test_gated_delta_nets_are_described(pattern: Any) -> None:
    found = shape(linear_attention_freq=pattern, **NETS)
    assert found.linear_attention == GatedDeltaNet(2, 4, 16, 32, 4)
    assert (found.full_attention_every, found.output_gate) == (4, True)


def test_nets_alone_and_none() -> None:
    assert shape(linear_attention_freq=[1] * 8, **NETS).full_attention_every == 0
    assert shape().linear_attention is None
    assert not shape().output_gate
