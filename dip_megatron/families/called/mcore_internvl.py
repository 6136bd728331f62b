"""InternVL of mcore-bridge (InternVL3, 3.5 in Hugging Face's layout): Hugging Face's InternViT before a GPT."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from mcore_bridge.model.mm_gpts.internvl import InternvlHfVit

from ...describe.files import ConfigurationError
from ...describe.model import ModuleShape, PatchEmbedding, TransformerLayer
from ..shared.cut import CutPoints
from .mcore_bridge import McoreBridgePage
from .page import Arguments, Encoder, projector_of
from .shapes import HiddenShape


class Vision(Encoder):
    """An instance is a tile, of which all have one size: loops cut pictures, and frames of videos, into tiles."""

    called = "visual.get_image_features"
    depth = "hf_config.vision_config.num_hidden_layers"

    def points(self, config: Any) -> CutPoints:
        return CutPoints(
            "visual.vision_tower.encoder.layer",
            stem=("visual.vision_tower.embeddings",),
            tail=("visual.vision_tower.layernorm", "visual.multi_modal_projector"),
            halves=("attention", "mlp"),
        )

    def hidden(self, config: Any) -> HiddenShape:
        return HiddenShape(config.hf_config.vision_config.hidden_size, padded=_patches(config) + 1)

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        vision = config.hf_config.vision_config
        width, heads, merged = vision.hidden_size, vision.num_attention_heads, _merged(config)
        output = config.hidden_size
        return ModuleShape(
            self.name, self.kind, vision.num_hidden_layers,
            TransformerLayer(width, vision.intermediate_size, heads, heads, window=_patches(config)),
            PatchEmbedding(vision.patch_size[0], vision.num_channels),
            projector_of(merged * width * output + output**2, width, output, merged),
        )  # fmt: skip

    def tokens(self, config: Any, arguments: Arguments) -> list[int]:
        pixels, each = arguments.get("pixel_values"), _patches(config) // _merged(config)
        count = 0 if pixels is None else int(pixels.shape[0])
        places = int((arguments["input_ids"] == config.hf_config.image_token_id).sum())
        if places != count * each:
            raise ValueError(f"the microbatch has {places} image tokens for {count} tiles of {each}")
        return [each] * count

    def unit_tokens(self, config: Any, arguments: Arguments, own: slice) -> tuple[int, ...]:
        return (_patches(config) // _merged(config),) * (own.stop - own.start)

    def encode(self, model: Any, arguments: Arguments, own: slice, hidden: torch.Tensor | None) -> torch.Tensor:
        if hidden is None:
            hidden = arguments["pixel_values"][own].to(model.config.params_dtype)
        given = model.visual.hf_config
        output = model.visual.get_image_features(
            hidden, vision_feature_layer=given.vision_feature_layer,
            vision_feature_select_strategy=given.vision_feature_select_strategy,
        )  # fmt: skip
        embeddings: torch.Tensor = output.pooler_output.flatten(0, 1)
        return embeddings

    def lean(self, arguments: Arguments, present: bool) -> dict[str, Any]:
        return {"pixel_values": arguments["pixel_values"][:0] if present else None}

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        return lambda *_, **__: SimpleNamespace(pooler_output=embeddings)


class _Tower:
    """In the place of the encoder beside the language model, where the wrapper asks for its device."""

    def __init__(self, language: torch.nn.Module):
        self._language = [language]  # a list, so that it isn't taken for a submodule

    @property
    def device(self) -> torch.device:
        return next(self._language[0].parameters()).device


class McoreBridgeInternVl(McoreBridgePage):
    """Its projector takes the last layer's output, as in all published models."""

    name = "internvl-mcore-bridge"
    visual_class = InternvlHfVit
    encoders = (Vision(),)
    usual_picture = 256

    def check(self, config: Any) -> None:
        super().check(config)
        given = config.hf_config
        if given.vision_feature_layer != -1 or given.vision_feature_select_strategy != "default":
            raise ConfigurationError(
                f"DIP can't run InternVL with vision_feature_layer {given.vision_feature_layer} and "
                f"{given.vision_feature_select_strategy!r}, only with the last layer's output without its class token"
            )

    def chunk(self, kwargs: Mapping[str, Any], config: Any, *, first: bool, last: bool, segment: int) -> Any:
        model = super().chunk(kwargs, config, first=first, last=last, segment=segment)
        if first:
            del model.visual.vision_tower
            model.visual.__dict__["vision_tower"] = _Tower(model.language_model)
        return model


def _patches(config: Any) -> int:
    """Of a tile."""
    vision = config.hf_config.vision_config
    rows, columns = (pixels // patch for pixels, patch in zip(vision.image_size, vision.patch_size, strict=True))
    return int(rows * columns)


def _merged(config: Any) -> int:
    """Patches that become one token."""
    return round(config.hf_config.downsample_ratio**-2)
