"""Memory strategies of Hugging Face's blocks: the same gradients, and less kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.processes import team

STRATEGIES = ("none", "full", "selective", "mlp", "activation", "offload")


def gradients(rank: int, world: int, strategy: str) -> tuple[list[torch.Tensor], int]:
    """Of two blocks, the first without a strategy; and how many bytes their forward left to autograd."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    from dip_megatron.families.shared import block_memory
    from dip_megatron.runtime.layer_context import LayerContext

    torch.manual_seed(5)
    config = Qwen2_5_VLVisionConfig(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=16)
    visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(config)
    mode = LayerContext()
    block_memory.install(list(visual.blocks), mode)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    pixels, grid = torch.randn(64, 3 * 2 * 14 * 14), torch.tensor([[1, 8, 8]])
    offloaded = mode.offload() if strategy == "offload" else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), mode.stage(None, ("none", strategy), offloaded):
        output = visual(pixels, grid_thw=grid).pooler_output
    with mode.stage(None):
        output.square().sum().backward()
    return [p.grad for p in visual.parameters()], sum(kept.values())


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_gradients_are_those_of_plain_blocks(strategy: str) -> None:
    ((plain, all_kept),) = team(1).run(gradients, "none")
    ((found, kept),) = team(1).run(gradients, strategy)

    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert kept < all_kept


def test_recomputing_more_keeps_less() -> None:
    kept: dict[str, Any] = {name: team(1).run(gradients, name)[0][1] for name in ("full", "mlp", "selective", "none")}

    assert kept["full"] < min(kept["mlp"], kept["selective"])
