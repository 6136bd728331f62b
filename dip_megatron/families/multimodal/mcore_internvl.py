"""InternVL of mcore-bridge: InternViT before a GPT. Published folders of InternVL3 and 3.5 have one of two layouts:
that of Hugging Face's class, and one of their own that brings the encoder's code."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from mcore_bridge.model.mm_gpts.internvl import InternvlHfVit, InternvlVit
from transformers import AutoTokenizer

from ...describe.files import ConfigurationError
from ...describe.model import ModuleShape, PatchEmbedding, TransformerLayer
from ..shared.cut import CutPoints
from .mcore_bridge import McoreBridgeSpec
from .model_spec import Arguments, Encoder, projector_of
from .shapes import HiddenShape


class Tiles(Encoder):
    """An instance is a tile, of which all have one size: loops cut pictures, and frames of videos, into tiles."""

    depth = "hf_config.vision_config.num_hidden_layers"

    @abstractmethod
    def token(self, config: Any) -> int:
        """Id of the token in whose places tiles stand."""

    def hidden(self, config: Any) -> HiddenShape:
        return HiddenShape(config.hf_config.vision_config.hidden_size, padded=_patches(config) + 1)

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        vision = config.hf_config.vision_config
        width, heads, merged = vision.hidden_size, vision.num_attention_heads, _merged(config)
        output = config.hidden_size
        return ModuleShape(
            self.name, self.kind, vision.num_hidden_layers,
            TransformerLayer(width, vision.intermediate_size, heads, heads, window=_patches(config)),
            PatchEmbedding(_both(vision.patch_size)[0], vision.num_channels),
            projector_of(merged * width * output + output**2, width, output, merged),
        )  # fmt: skip

    def tokens(self, config: Any, arguments: Arguments) -> list[int]:
        pixels, each = arguments.get("pixel_values"), _patches(config) // _merged(config)
        count = 0 if pixels is None else int(pixels.shape[0])
        places = int((arguments["input_ids"] == self.token(config)).sum())
        if places != count * each:
            raise ValueError(f"the microbatch has {places} image tokens for {count} tiles of {each}")
        return [each] * count

    def unit_tokens(self, config: Any, arguments: Arguments, own: slice) -> tuple[int, ...]:
        return (_patches(config) // _merged(config),) * (own.stop - own.start)

    def lean(self, arguments: Arguments, present: bool) -> dict[str, Any]:
        return {"pixel_values": arguments["pixel_values"][:0] if present else None}


class Vision(Tiles):
    """As Hugging Face has it."""

    called = "visual.get_image_features"

    def token(self, config: Any) -> int:
        return int(config.hf_config.image_token_id)

    def points(self, config: Any) -> CutPoints:
        return CutPoints(
            "visual.vision_tower.encoder.layer",
            stem=("visual.vision_tower.embeddings",),
            tail=("visual.vision_tower.layernorm", "visual.multi_modal_projector"),
            halves=("attention", "mlp"),
        )

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

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        return lambda *_, **__: SimpleNamespace(pooler_output=embeddings)


class OwnVision(Tiles):
    """By the code in the model's folder."""

    called = "visual.extract_feature"

    def token(self, config: Any) -> int:
        return _context_token(config.hf_config.name_or_path)

    def points(self, config: Any) -> CutPoints:
        return CutPoints(
            "visual.vision_model.encoder.layers", stem=("visual.vision_model.embeddings",), tail=("visual.mlp1",)
        )

    def encode(self, model: Any, arguments: Arguments, own: slice, hidden: torch.Tensor | None) -> torch.Tensor:
        if hidden is None:
            pixels = arguments["pixel_values"][own].to(model.config.params_dtype)
        else:
            pixels = hidden[:, None]  # the folder's code takes nothing without four dimensions
        embeddings: torch.Tensor = model.visual.extract_feature(pixels).flatten(0, 1)
        return embeddings

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        return lambda *_, **__: embeddings


class McoreBridgeInternVl(McoreBridgeSpec):
    """Its projector takes the last layer's output, as in all published models."""

    name = "internvl-mcore-bridge"
    visual_class = InternvlHfVit
    tower = "vision_tower"
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


class McoreBridgeInternVlChat(McoreBridgeSpec):
    """In the layout that brings its own code; the same of it."""

    name = "internvl-chat-mcore-bridge"
    visual_class = InternvlVit
    tower = "vision_model"
    encoders = (OwnVision(),)
    usual_picture = 256

    def check(self, config: Any) -> None:
        super().check(config)
        if config.hf_config.select_layer != -1:
            raise ConfigurationError(
                f"DIP can't run InternVL with select_layer {config.hf_config.select_layer}, only with the last layer's "
                "output (-1); use schedule off"
            )


@cache
def _context_token(folder: str) -> int:
    """Which token stands for tiles, only the tokenizer of the model's folder knows; mcore-bridge asks it, too."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return int(tokenizer.encode("<IMG_CONTEXT>", add_special_tokens=False)[0])


def _patches(config: Any) -> int:
    """Of a tile."""
    vision = config.hf_config.vision_config
    pixels = getattr(config.hf_config, "force_image_size", None) or vision.image_size
    rows, columns = (side // patch for side, patch in zip(_both(pixels), _both(vision.patch_size), strict=True))
    return int(rows * columns)


def _merged(config: Any) -> int:
    """Patches that become one token."""
    return round(config.hf_config.downsample_ratio**-2)


def _both(given: Any) -> tuple[int, int]:
    """Height and width."""
    return (given, given) if isinstance(given, int) else tuple(given)
