"""Qwen2-VL and Qwen2.5-VL of mcore-bridge: Hugging Face's vision transformers before a GPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_bridge.model.mm_gpts.qwen import Qwen2_5VL_Vit, Qwen2VL_Vit

from ...describe.model import ModuleShape, PatchEmbedding, TransformerLayer
from ..describe import trainable_parts
from .mcore_bridge import McoreBridgePage, WrappedVision
from .page import projector_of
from .qwen25_vision import WindowedVision
from .shapes import HiddenShape


class Vision(WrappedVision, WindowedVision):
    """As Megatron-Bridge's Qwen2.5-VL has it."""


class PlainVision(Vision):
    """Qwen2-VL's has full attention within each frame, and MLPs of two matrices; of its config, ``hidden_size`` is the
    language model's."""

    def hidden(self, config: Any) -> HiddenShape:
        return HiddenShape(self.config(config).embed_dim, rows=self.merged(config))

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        vision = self.config(config)
        width, merged, output = vision.embed_dim, self.merged(config), vision.hidden_size
        return ModuleShape(
            self.name, self.kind, vision.depth,
            TransformerLayer(width, int(width * vision.mlp_ratio), vision.num_heads, vision.num_heads),
            PatchEmbedding(vision.patch_size, vision.in_channels, vision.temporal_patch_size),
            projector_of(merged * width * (merged * width + output), width, output, merged),
            trainable=trainable_parts(stem=True, layers=True, head=True),
        )  # fmt: skip


class McoreBridgeQwen2Vl(McoreBridgePage):
    """Images and videos of any size; text alone."""

    name = "qwen2-vl-mcore-bridge"
    visual_class = Qwen2VL_Vit
    encoders = (PlainVision(),)


class McoreBridgeQwen25Vl(McoreBridgePage):
    """Images and videos of any size; text alone."""

    name = "qwen2-5-vl-mcore-bridge"
    visual_class = Qwen2_5VL_Vit
    encoders = (Vision(),)
