"""Kimi-K2.5 of Megatron-Bridge: MoonViT, from the code in the model's folder, before a GPT of latent attention and
experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from megatron.bridge.models.kimi_vl.modeling_kimi_k25_vl import KimiK25VLModel

from ...compat.bridge_building import KIMI_FEATURES, kimi_features
from ...describe.model import ModuleShape, PatchEmbedding, TransformerLayer
from ..describe import trainable_parts
from ..shared.cut import CutPoints
from .page import Arguments, Encoder, ProviderPage, check_places, projector_of
from .shapes import HiddenShape

_PIXELS, _GRIDS = "pixel_values", "image_grid_thw"


class Vision(Encoder):
    """An instance is a picture of any size."""

    called = KIMI_FEATURES
    depth = "vision_config.vt_num_hidden_layers"

    def points(self, config: Any) -> CutPoints:
        return CutPoints(
            "vision_tower.encoder.blocks",
            stem=("vision_tower.patch_embed",),
            tail=("vision_tower.encoder.final_layernorm", "mm_projector"),
            halves=("", "mlp"),
        )

    def hidden(self, config: Any) -> HiddenShape:
        return HiddenShape(config.vision_config.vt_hidden_size, rows=_merged(config))

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        vision, merged = config.vision_config, _merged(config)
        width, heads = vision.vt_hidden_size, vision.vt_num_attention_heads
        sees = not freeze.get("freeze_vision_model")
        parameters = (merged * width) ** 2 + merged * width * config.hidden_size
        return ModuleShape(
            self.name, self.kind, vision.vt_num_hidden_layers,
            TransformerLayer(width, vision.vt_intermediate_size, heads, heads),
            PatchEmbedding(vision.patch_size, 3),
            projector_of(parameters, width, config.hidden_size, merged),
            trainable=trainable_parts(stem=sees, layers=sees, head=not freeze.get("freeze_vision_projection")),
        )  # fmt: skip

    def tokens(self, config: Any, arguments: Arguments) -> list[int]:
        grids = arguments.get(_GRIDS)
        found = [] if grids is None else grids.tolist()
        if any(frames > 1 for frames, _, _ in found):
            raise ValueError("DIP can't run videos of Kimi-K2.5, whose frames are averaged; give frames as pictures")
        counted = [height * width // _merged(config) for _, height, width in found]
        return check_places(
            arguments, config.media_placeholder_token_id, counted, "image", "images",
            "; give each as many, and cut no image off at a sequence's end",
        )  # fmt: skip

    def encode(self, model: Any, arguments: Arguments, own: slice, hidden: torch.Tensor | None) -> torch.Tensor:
        grids = arguments[_GRIDS]
        if hidden is None:
            patches = grids.prod(dim=-1).tolist()
            start = sum(patches[: own.start])
            pixels = arguments[_PIXELS][start : start + sum(patches[own])]
            hidden = pixels.to(model.config.params_dtype)
        return kimi_features(model, hidden, grids[own])

    def lean(self, arguments: Arguments, present: bool) -> dict[str, Any]:
        """A single patch, or the model would take the microbatch for one of text alone."""
        return {_PIXELS: arguments[_PIXELS][:1] if present else None}

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        return lambda *_: [embeddings]


class KimiK25Vl(ProviderPage):
    """Its encoder's classes come with the model's folder; nothing of them is asked but the names of its modules."""

    name = "kimi-k2-5"
    model_class = KimiK25VLModel
    encoders = (Vision(),)
    usual_picture = 391

    def decoder(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        """Latent attention as a grouped one with as few keys and values as tensor-parallel ranks allow, which comes
        nearest in parameters: 2 h * heads * v for queries and output, of latent attention's h * (q + kv + positions) +
        heads * (q * (k + positions) + kv * (k + v) + h * v), ``q`` and ``kv`` the ranks (arXiv 2405.04434)."""
        shape = super().decoder(config, freeze)
        few = replace(shape.layer, kv_groups=config.tensor_model_parallel_size, head_dim=config.v_head_dim)
        return replace(shape, layer=few)

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


def _merged(config: Any) -> int:
    """Patches that become one token."""
    rows, columns = config.vision_config.merge_kernel_size
    return int(rows * columns)
