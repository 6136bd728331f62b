"""Kimi-VL of mcore-bridge: MoonViT, from the code in the model's folder, before a GPT of latent attention and
experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mcore_bridge.model.mm_gpts.kimi_vl import KimiVLVit

from ...compat.mcore_bridge import KIMI_FEATURES, kimi_features
from ...describe.model import ModuleShape
from ..describe import latent_as_grouped
from .mcore_bridge import McoreBridgeSpec
from .moonvit import MoonVision, MoonVitSizes


class Vision(MoonVision):
    """Within mcore-bridge's wrapper."""

    called = f"visual.{KIMI_FEATURES}"
    depth = "hf_config.vision_config.num_hidden_layers"
    grids = "image_grid_hws"
    inside = "visual."
    projector = "multi_modal_projector"

    def sizes(self, config: Any) -> MoonVitSizes:
        given = config.hf_config.vision_config
        return MoonVitSizes(
            given.num_hidden_layers, given.hidden_size, given.intermediate_size, given.num_attention_heads,
            given.patch_size, tuple(given.merge_kernel_size),
        )  # fmt: skip

    def token(self, config: Any) -> int:
        return int(config.hf_config.media_placeholder_token_id)

    def features(self, model: Any, rows: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        return kimi_features(model.visual, rows, grids)

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        return lambda *_: embeddings


class McoreBridgeKimiVl(McoreBridgeSpec):
    """Pictures of any size; text alone."""

    name = "kimi-vl-mcore-bridge"
    visual_class = KimiVLVit
    tower = "vision_tower"
    encoders = (Vision(),)
    usual_picture = 391

    def decoder(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        return latent_as_grouped(super().decoder(config, freeze), config)
