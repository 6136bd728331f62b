"""Latent attention in the planner's words has as many parameters, as near as a grouped one comes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dip_megatron.describe.model import LanguageHead, ModuleShape, TokenEmbedding, TransformerLayer
from dip_megatron.families.describe import latent_as_grouped

QUERIES = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}


@pytest.mark.parametrize(
    ("hidden", "heads", "tensor", "given", "groups", "matrices"),
    [
        # Kimi-K2: 7168 x 1536, 1536 x 64 x 192, 7168 x 576, 512 x 64 x 256, 64 x 128 x 7168; a grouped one has more.
        (7168, 64, 2, QUERIES, 2, 101_122_048),
        # Moonlight: 2048 x 16 x 192, 2048 x 576, 512 x 16 x 256, 16 x 128 x 2048.
        (2048, 16, 1, QUERIES | {"q_lora_rank": None}, 8, 13_762_560),
        (2048, 16, 16, QUERIES | {"q_lora_rank": None}, 16, 13_762_560),
    ],
)
def test_nearest_number_of_keys_and_values(
    hidden: int, heads: int, tensor: int, given: dict[str, int | None], groups: int, matrices: int
) -> None:
    config = SimpleNamespace(
        hidden_size=hidden, num_attention_heads=heads, tensor_model_parallel_size=tensor, **given
    )  # fmt: skip
    layer = TransformerLayer(hidden, 4 * hidden, heads, heads, head_dim=64, gated=True, causal=True)
    module = ModuleShape("language", "text", 2, layer, TokenEmbedding(64), LanguageHead(64))
    found = latent_as_grouped(module, config).layer
    assert (found.kv_groups, found.head_dim) == (groups, 128)
    attention = found.parameters - 3 * hidden * 4 * hidden
    of = {g: 2 * hidden * 128 * (heads + g) for g in range(tensor, heads + 1, tensor) if heads % g == 0}
    assert attention == pytest.approx(of[groups], rel=1e-3)
    assert all(abs(of[groups] - matrices) <= abs(of[g] - matrices) for g in of)
