"""Descriptions that disagree with the model are refused, in a line that says what to change."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bridge import equality
from tests.bridge.equality import Case
from tests.bridge.tiny import TINY
from tests.bridge.tiny_mcore import MCORE_TINY
from tests.processes import team

LAYERS: dict[str, tuple[tuple[int, ...], ...]] = {"vision": ((3, 2),), "language": ((3, 3),)}


def refused(rank: int, world: int, folder: Path) -> dict[str, str]:
    """By what is wrong of a page, what is said of it."""
    from dip_megatron.families.multimodal import qwen3_vl
    from dip_megatron.families.multimodal.bridge_models import BRIDGE_FAMILIES
    from dip_megatron.families.multimodal.kimi_k25_vl import KimiK25Vl
    from dip_megatron.families.multimodal.program import MultimodalProgram
    from dip_megatron.megatron.build import record_blueprint
    from dip_megatron.runtime.protocol import MicrobatchInputs

    case = Case("qwen3-vl", folder, LAYERS)
    _, provider = equality.provider_of(case, world)
    _, blueprint = record_blueprint(BRIDGE_FAMILIES, provider.provide, pre_process=True, post_process=True)
    right = qwen3_vl.Vision().points(provider)

    def said(**changes: Any) -> str:
        class Vision(qwen3_vl.Vision):
            def points(self, config: Any) -> Any:
                return replace(right, **changes)

        class ModelSpec(qwen3_vl.Qwen3Vl):
            encoders = (Vision(),)

        with pytest.raises(ValueError) as error:  # noqa: PT011  what it says is compared below
            MultimodalProgram(ModelSpec(), blueprint.kwargs, LAYERS, rank=rank).build_chunks()
        return str(error.value)

    found = {
        "stem": said(stem=("vision_model.patch_embed",)),
        "tail": said(tail=()),
        "layers": said(layers="vision_model.blocks"),
        "taps": said(tapped=(0, 1)),
    }
    with pytest.raises(ValueError) as error:  # noqa: PT011
        MultimodalProgram(qwen3_vl.Qwen3Vl(), blueprint.kwargs, {**LAYERS, "vision": ((2, 2),)}, rank=rank)
    found["depth"] = str(error.value)
    program = MultimodalProgram(qwen3_vl.Qwen3Vl(), blueprint.kwargs, LAYERS, rank=rank)
    arguments = case.of.arguments((("image", (1, 4, 4)),), 1)
    arguments["input_ids"] = torch.full_like(arguments["input_ids"], 5)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        program.load(MicrobatchInputs(program.bind(**arguments)))
    found["batch"] = str(error.value)
    program.shapes = replace(program.shapes, context_parallel_size=2)
    arguments = case.of.arguments((), 1)
    arguments["input_ids"] = arguments["input_ids"][:, :-2]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        program.load(MicrobatchInputs(program.bind(**arguments)))
    found["shares"] = str(error.value)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        qwen3_vl.Qwen3Vl().check(SimpleNamespace(context_parallel_size=2, vision_dp_when_cp=True))
    found["vision_dp_when_cp"] = str(error.value)
    row = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 8, 15]), cu_seqlens_q_padded=torch.tensor([0, 8, 16]))
    pages = {"filled": (qwen3_vl.Qwen3Vl(), (8, 8)), "unfilled": (qwen3_vl.Qwen3Vl(), (8, 8, 4))}
    for name, (page, samples) in {**pages, "packed": (KimiK25Vl(), (8, 8))}.items():
        try:
            page.check_shared(samples, row, 2)
        except ValueError as error:
            found[name] = str(error)
    return found


def said_of_tiles(rank: int, world: int, folder: Path) -> dict[str, str]:
    """Of InternVL in the layout that brings its own code."""
    from dip_megatron.families.multimodal import mcore_internvl

    case = Case("internvl-chat", folder, {})
    _, models = equality.provider_of(case, world)
    page, config = mcore_internvl.McoreBridgeInternVlChat(), models.config
    page.check(config)
    arguments = case.of.arguments((("image", (1, 4, 4)),), 1)
    (vision,) = page.encoders
    assert vision.tokens(config, arguments) == [4]
    arguments["pixel_values"] = arguments["pixel_values"].repeat(2, 1, 1, 1)
    with pytest.raises(ValueError) as error:  # noqa: PT011  what it says is compared below
        vision.tokens(config, arguments)
    found = {"batch": str(error.value)}
    config.hf_config.select_layer = -4
    with pytest.raises(ValueError) as error:  # noqa: PT011
        page.check(config)
    return found | {"select_layer": str(error.value)}


@pytest.mark.skipif(importlib.util.find_spec("mcore_bridge") is None, reason="needs mcore-bridge")
def test_tiles_are_refused_that_cannot_be_told(tmp_path: Path) -> None:
    MCORE_TINY["internvl-chat"].save(tmp_path)
    (found,) = team(1).run(said_of_tiles, tmp_path)

    assert found["batch"] == "the microbatch has 4 image tokens for 2 tiles of 4"
    assert "with select_layer -4, only with the last layer's output (-1)" in found["select_layer"]


def test_a_page_that_is_wrong_is_told(tmp_path: Path) -> None:
    TINY["qwen3-vl"].save(tmp_path)
    (found,) = team(1).run(refused, tmp_path)

    assert "vision_model.pos_embed.weight would stand on every chunk; name its module in the stem" in found["stem"]
    assert "vision_model.merger" in found["tail"]
    assert "Qwen3VLModel has no 'vision_model.blocks'; its Qwen3VLVisionModel has patch_embed" in found["layers"]
    assert "has 3 modules, the description taps layers (0, 1)" in found["taps"]
    assert found["depth"] == "partition gives vision 4 layers, the model has 5"
    assert found["batch"] == "the microbatch has 0 image tokens for 1 images that become 4"
    assert found["shares"].startswith("2 context-parallel ranks share sequences of a multiple of 4 tokens")
    assert "this microbatch has 94; pad each, or use context_parallel_size 1" in found["shares"]
    assert "filled" not in found
    assert found["unfilled"].startswith("samples end before the 20 tokens of their row do")
    assert "Bridge's KimiK25VLModel shares no packed samples out" in found["packed"]
    assert "leave out vision_dp_when_cp" in found["vision_dp_when_cp"]
