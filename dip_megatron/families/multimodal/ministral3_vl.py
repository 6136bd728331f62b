"""Ministral3-VL of Megatron-Bridge: Hugging Face's Pixtral for pictures of any size, before a GPT."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from megatron.bridge.models.ministral3.modeling_ministral3 import Ministral3Model

from ...describe.model import ModuleShape, PatchEmbedding, TransformerLayer
from ..describe import trainable_parts
from ..shared.cut import CutPoints
from ..shared.layer_memory import WRITES_QUERY
from .model_spec import Arguments, Encoder, ProviderSpec, check_places, drop, projector_of
from .shapes import HiddenShape


class _Patches(torch.nn.Module):
    """In the place of the convolution over pixels on chunks after the first: as many patches, of nothing."""

    def __init__(self, whole: torch.nn.Module):
        super().__init__()
        found: Any = whole
        self._width, self._patch = found.out_channels, found.kernel_size[0]
        self.weight = torch.empty(0, dtype=found.weight.dtype)  # of which the encoder asks the dtype

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        images, _, height, width = pixels.shape
        return pixels.new_zeros(images, self._width, height // self._patch, width // self._patch)


class Vision(Encoder):
    """Pictures come padded to the largest, their patches go without padding; ``merge ** 2`` become one token."""

    called = "get_image_features"
    depth = "hf_config.vision_config.num_hidden_layers"

    def points(self, config: Any) -> CutPoints:
        return CutPoints(
            "vision_tower.transformer.layers",
            stem=("vision_tower.patch_conv", "vision_tower.ln_pre"),
            stubs={"vision_tower.patch_conv": _Patches},
            tail=("multi_modal_projector",),
            halves=("attention", "feed_forward"),
        )

    def hidden(self, config: Any) -> HiddenShape:
        return HiddenShape(config.hf_config.vision_config.hidden_size, rows=config.hf_config.spatial_merge_size**2)

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        vision, merge = config.hf_config.vision_config, config.hf_config.spatial_merge_size
        width, heads = vision.hidden_size, vision.num_attention_heads
        sees = not freeze.get("freeze_vision_model")
        # One matrix merges patches, two project them.
        parameters = (merge * width) ** 2 + width * config.hidden_size + config.hidden_size**2
        return ModuleShape(
            self.name, self.kind, vision.num_hidden_layers,
            TransformerLayer(width, vision.intermediate_size, heads, heads, gated=True),
            PatchEmbedding(vision.patch_size, vision.num_channels),
            projector_of(parameters, width, config.hidden_size, merge**2),
            trainable=trainable_parts(stem=sees, layers=sees, head=not freeze.get("freeze_vision_projection")),
        )  # fmt: skip

    def tokens(self, config: Any, arguments: Arguments) -> list[int]:
        pixels = config.hf_config.vision_config.patch_size * config.hf_config.spatial_merge_size
        counted = [(height // pixels) * (width // pixels) for height, width in _sizes(arguments)]
        return check_places(arguments, config.image_token_id, counted, "image", "images")

    def encode(self, model: Any, arguments: Arguments, own: slice, hidden: torch.Tensor | None) -> torch.Tensor:
        sizes = arguments["image_sizes"][own]
        if hidden is None:
            pixels = arguments["pixel_values"][own].to(model.config.params_dtype)
        else:
            pixels = hidden.new_zeros(len(sizes), 3, *sizes.amax(dim=0).tolist())
        output = model.vision_tower(pixels, image_sizes=sizes).last_hidden_state
        embeddings: torch.Tensor = model.multi_modal_projector(output[0], sizes)
        return embeddings

    def leaving(self, arguments: Arguments, own: slice, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[0]

    def arriving(self, arguments: Arguments, own: slice, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[None]

    def lean(self, arguments: Arguments, present: bool) -> dict[str, Any]:
        return {"pixel_values": arguments["pixel_values"][:0] if present else None}

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        return lambda *_, **__: SimpleNamespace(pooler_output=(embeddings,))


def _sizes(arguments: Arguments) -> list[list[int]]:
    """Height and width of each picture, in pixels."""
    sizes = arguments.get("image_sizes")
    return [] if sizes is None else sizes.tolist()


class Ministral3Vl(ProviderSpec):
    """Its projector takes the last layer's output, as in all published models."""

    name = "ministral3-vl"
    model_class = Ministral3Model
    encoders = (Vision(),)
    shares = True
    usual_picture = 391

    def check(self, config: Any) -> None:
        super().check(config)
        layer = getattr(config.hf_config, "vision_feature_layer", -1)
        if layer != -1:
            raise ValueError(f"DIP can't run Ministral3-VL with vision_feature_layer {layer}, only with the last one's")

    def chunk(self, kwargs: Mapping[str, Any], config: Any, *, first: bool, last: bool, segment: int) -> Any:
        model = super().chunk(kwargs, config, first=first, last=last, segment=segment)
        for layer in model.language_model.decoder.layers:  # Bridge's attention scales queries in place
            setattr(layer.self_attention, WRITES_QUERY, True)
        drop(model, first, "vision_tower")
        return model
