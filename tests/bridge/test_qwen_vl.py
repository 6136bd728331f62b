"""What DIP's family makes of a Qwen2.5-VL provider, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dip_megatron.describe.model import Parallel, load_model
from tests.processes import team

LAYERS = {"vision": ((4, 4),), "language": ((2, 2),)}


def provider(**changes: Any) -> Any:
    from megatron.bridge.models.qwen_vl.qwen25_vl_provider import Qwen25VLModelProvider
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    vision = Qwen2_5_VLVisionConfig(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, temporal_patch_size=2,
        spatial_merge_size=2, window_size=112, fullatt_block_indexes=[7, 15, 23, 31], out_hidden_size=3584,
    )  # fmt: skip
    values = {
        "num_layers": 28, "hidden_size": 3584, "ffn_hidden_size": 18944, "num_attention_heads": 28,
        "num_query_groups": 4, "vocab_size": 152064, "seq_length": 8192, "gated_linear_unit": True,
        "vision_config": vision, "share_embeddings_and_output_weights": False,
    }  # fmt: skip
    return Qwen25VLModelProvider(**values | changes)


def described(rank: int, world: int) -> Any:
    from dip_megatron.families.multimodal.qwen25_vl import Qwen25Vl

    return Qwen25Vl().describe(provider(), {}, Parallel(tp=2, pp=4, dp=2))


def test_the_published_7b_is_described_as_its_model_file() -> None:
    (model,) = team(1).run(described)
    expected = load_model("qwen2-5-vl-7b")

    assert model.modules == expected.modules
    assert (model.parallel, model.packing) == (expected.parallel, expected.packing)


def refused(rank: int, world: int) -> list[str]:
    from dip_megatron.families.multimodal.program import MultimodalProgram
    from dip_megatron.families.multimodal.qwen25_vl import Qwen25Vl
    from dip_megatron.runtime.protocol import MicrobatchInputs

    def program_of(config: Any, layers: Any, rank: int) -> Any:
        return MultimodalProgram(Qwen25Vl(), {"config": config}, layers, rank=rank)

    layers = {"vision": ((16, 16),), "language": ((14, 14),)}
    program = program_of(provider(), layers, rank=0)
    ids = torch.zeros(1, 8, dtype=torch.long)
    picture = program.bind(ids, image_grid_thw=torch.tensor([[1, 4, 4]]))
    said = []
    for attempt in (
        lambda: program_of(provider(), LAYERS, rank=0),
        lambda: program_of(provider(mtp_num_layers=1), layers, rank=0),
        lambda: program_of(provider(context_parallel_size=2), layers, rank=0),
        lambda: program.bind(ids, inputs_embeds=ids),
        lambda: program.load(MicrobatchInputs({})),
        lambda: program.load(MicrobatchInputs(picture)),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011  what it says is compared below
            attempt()
        said.append(str(error.value))
    return said


def test_what_it_cannot_run_is_refused_with_a_reason() -> None:
    reasons = [
        "gives vision 8 layers, the model has 32", "multi-token", "context parallelism", "embeddings instead of tokens",
        "no tokens", "0 image tokens for 1 images that become 4",
    ]  # fmt: skip
    for reason, text in zip(reasons, team(1).run(refused)[0], strict=True):
        assert reason in text


def faults(rank: int, world: int) -> list[str]:
    from dip_megatron.compat import topics_of
    from dip_megatron.compat.names import fault

    found = [fault(name) for topic in topics_of("bridge") for name in topic.names]
    assert found
    return [line for line in found if line is not None]


def test_the_names_it_leans_on_are_there() -> None:
    assert team(1).run(faults) == [[]]
