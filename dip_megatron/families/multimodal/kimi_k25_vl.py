"""Kimi-K2.5 of Megatron-Bridge: MoonViT, from the code in the model's folder, before a GPT of latent attention and
experts."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from megatron.bridge.models.kimi_vl.modeling_kimi_k25_vl import KimiK25VLModel

from ...compat.bridge_building import KIMI_FEATURES, kimi_features
from ...describe.model import ModuleShape
from ..describe import latent_as_grouped
from .model_spec import Arguments, ProviderSpec
from .moonvit import MoonVision, MoonVitSizes


class Vision(MoonVision):
    """Pictures; of videos, whose frames are averaged, none."""

    called = KIMI_FEATURES
    depth = "vision_config.vt_num_hidden_layers"
    grids = "image_grid_thw"
    projector = "mm_projector"

    def sizes(self, config: Any) -> MoonVitSizes:
        given = config.vision_config
        return MoonVitSizes(
            given.vt_num_hidden_layers, given.vt_hidden_size, given.vt_intermediate_size, given.vt_num_attention_heads,
            given.patch_size, tuple(given.merge_kernel_size),
        )  # fmt: skip

    def token(self, config: Any) -> int:
        return int(config.media_placeholder_token_id)

    def tokens(self, config: Any, arguments: Arguments) -> list[int]:
        grids = arguments.get(self.grids)
        if grids is not None and any(frames > 1 for frames, _, _ in grids.tolist()):
            raise ValueError("DIP can't run videos of Kimi-K2.5, whose frames are averaged; give frames as pictures")
        return super().tokens(config, arguments)

    def features(self, model: Any, rows: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        return kimi_features(model, rows, grids)

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        return lambda *_: [embeddings]


class KimiK25Vl(ProviderSpec):
    """Its encoder's classes come with the model's folder; nothing of them is asked but the names of its modules."""

    name = "kimi-k2-5"
    model_class = KimiK25VLModel
    encoders = (Vision(),)
    shares = True
    usual_picture = 391

    def decoder(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        return latent_as_grouped(super().decoder(config, freeze), config)

    def chunk(self, kwargs: Mapping[str, Any], config: Any, *, first: bool, last: bool, segment: int) -> Any:
        """Built as a later stage is, which has no encoder, but for the language model in it: depth of the encoder is
        read from the folder, so that none can't be asked for."""
        build = config.provide_language_model

        def language_model(pre_process: bool, **given: Any) -> Any:
            return build(pre_process=first, **given)

        config.provide_language_model = language_model
        try:
            model = KimiK25VLModel(config, pre_process=False, post_process=last, vp_stage=segment)
        finally:
            del config.provide_language_model
        model.pre_process = first
        if first:
            model.__dict__["vision_tower"] = SimpleNamespace(dtype=config.params_dtype)  # which is asked for it
        return model
