"""Gemma3-VL of Megatron-Bridge: Hugging Face's SigLIP for pictures of one size, and a GPT that attends in windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from megatron.bridge.models.gemma_vl.modeling_gemma3_vl import Gemma3VLModel

from ...describe.model import ModuleShape, PatchEmbedding, TransformerLayer
from ..describe import trainable_parts
from ..shared.cut import CutPoints
from .model_spec import Arguments, Encoder, ProviderSpec, projector_of
from .shapes import HiddenShape


class Vision(Encoder):
    """Every picture becomes as many tokens."""

    called = "vision_tower"
    gathers_before = "multi_modal_projector"
    depth = "vision_config.num_hidden_layers"

    def points(self, config: Any) -> CutPoints:
        return CutPoints(
            "vision_tower.encoder.layers",
            stem=("vision_tower.embeddings",),
            tail=("vision_tower.post_layernorm", "multi_modal_projector"),
            halves=("self_attn", "mlp"),
        )

    def hidden(self, config: Any) -> HiddenShape:
        return HiddenShape(config.vision_config.hidden_size, padded=_patches(config))

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        vision = config.vision_config
        heads, width = vision.num_attention_heads, vision.hidden_size
        sees = not freeze.get("freeze_vision_model")
        # The projector averages patches, then has one matrix.
        reduction = _patches(config) // config.mm_tokens_per_image
        return ModuleShape(
            self.name, self.kind, vision.num_hidden_layers,
            TransformerLayer(width, vision.intermediate_size, heads, heads),
            PatchEmbedding(vision.patch_size, vision.num_channels),
            projector_of(width * config.hidden_size, width, config.hidden_size, reduction),
            trainable=trainable_parts(stem=sees, layers=sees, head=not freeze.get("freeze_vision_projection")),
        )  # fmt: skip

    def tokens(self, config: Any, arguments: Arguments) -> list[int]:
        pixels, each = arguments.get("pixel_values"), config.mm_tokens_per_image
        count = 0 if pixels is None else int(pixels.shape[0])
        places = int((arguments["input_ids"] == config.image_token_id).sum())
        if places != count * each:
            raise ValueError(f"the microbatch has {places} image tokens for {count} images of {each}")
        return [each] * count

    def unit_tokens(self, config: Any, arguments: Arguments, own: slice) -> tuple[int, ...]:
        return (config.mm_tokens_per_image,) * (own.stop - own.start)

    def encode(self, model: Any, arguments: Arguments, own: slice, hidden: torch.Tensor | None) -> torch.Tensor:
        if hidden is None:
            hidden = arguments["pixel_values"][own].to(model.config.params_dtype)
        output = model.vision_tower(pixel_values=hidden, return_dict=True).last_hidden_state
        embeddings: torch.Tensor = model.multi_modal_projector(output).flatten(0, 1)
        return embeddings

    def lean(self, arguments: Arguments, present: bool) -> dict[str, Any]:
        return {"pixel_values": arguments["pixel_values"][:0] if present else None}

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        return lambda **_: SimpleNamespace(last_hidden_state=embeddings)


class Gemma3Vl(ProviderSpec):
    """Masks that let an image see all of itself are made of the tokens, on every rank."""

    name = "gemma3-vl"
    model_class = Gemma3VLModel
    encoders = (Vision(),)
    workload = "vlm-documents"
    usual_picture = 256

    def chunk(self, kwargs: Mapping[str, Any], config: Any, *, first: bool, last: bool, segment: int) -> Any:
        model = super().chunk(kwargs, config, first=first, last=last, segment=segment)
        model.__dict__["multi_modal_projector"] = lambda embeddings: embeddings
        return model

    def decoder(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        shape = super().decoder(config, freeze)
        every = sum(config.interleaved_attn_pattern)
        return replace(shape, layer=replace(shape.layer, window=config.window_size, full_attention_every=every))


def _patches(config: Any) -> int:
    """Of a picture."""
    side: int = config.vision_config.image_size // config.vision_config.patch_size
    return side**2
