"""Qwen2.5-VL in the planner's words, from Bridge's provider."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...describe.model import (
    LanguageHead,
    ModuleShape,
    MultimodalModel,
    Packing,
    Parallel,
    PatchEmbedding,
    Projector,
    TokenEmbedding,
    TransformerLayer,
)
from ..describe import layer_shape, trainable_parts
from ..shared.shapes import LANGUAGE, VISION

_USUAL_PICTURE = 391
"""Tokens of a picture of 640 x 480 pixels, in tokens of 28 x 28."""


def describe_qwen_vl(provider: Any, freeze: Mapping[str, bool], parallel: Parallel) -> MultimodalModel:
    """The Qwen2.5-VL of this provider. Attention of the ViT is in windows, except in its few layers of full attention,
    which are taken to come at equal distances."""
    vision = provider.vision_config
    merge = vision.spatial_merge_size
    window = (vision.window_size // merge // vision.patch_size * merge) ** 2
    full = len(vision.fullatt_block_indexes)
    layer = TransformerLayer(
        hidden=vision.hidden_size, ffn=vision.intermediate_size, heads=vision.num_heads, kv_groups=vision.num_heads,
        gated=True, window=window, full_attention_every=vision.depth // full if full else 0,
    )  # fmt: skip
    sees = not freeze.get("freeze_vision_model")
    encoder = ModuleShape(
        VISION, "images", vision.depth, layer,
        PatchEmbedding(vision.patch_size, vision.in_channels, vision.temporal_patch_size),
        Projector(provider.hidden_size, vision.hidden_size * merge**2, merge**2),
        trainable=trainable_parts(stem=sees, layers=sees, head=not freeze.get("freeze_vision_projection")),
    )  # fmt: skip
    reads = not freeze.get("freeze_language_model")
    decoder = ModuleShape(
        LANGUAGE, "text", provider.num_layers, layer_shape(provider, causal=True), TokenEmbedding(provider.vocab_size),
        LanguageHead(provider.vocab_size, provider.share_embeddings_and_output_weights), (VISION,),
        trainable_parts(stem=reads, layers=reads, head=reads),
    )  # fmt: skip
    packing = Packing(max_tokens=provider.seq_length, image_tokens=min(_USUAL_PICTURE, provider.seq_length // 2))
    return MultimodalModel("qwen-vl", (encoder, decoder), parallel, packing)
