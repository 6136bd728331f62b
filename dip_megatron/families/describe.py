"""A live model in the planner's words: layer shapes and parallel sizes, from Megatron's own configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.core.models.vision.clip_vit_model import get_num_image_embeddings

from ..compat.experts import layers_with_experts
from ..describe.model import (
    Experts,
    GatedDeltaNet,
    LanguageHead,
    LatentEmbedding,
    LatentHead,
    ModuleShape,
    MultimodalModel,
    Packing,
    Parallel,
    PatchEmbedding,
    Projector,
    TokenEmbedding,
    TransformerLayer,
)
from .shared.shapes import DIFFUSION, LANGUAGE, VISION
from .t2v.program import with_defaults


def describe_llava(kwargs: Mapping[str, Any], freeze: Mapping[str, bool], parallel: Parallel) -> MultimodalModel:
    """The LLaVA of these LLaVAModel arguments. Attention of the ViT is full, of the language model causal."""
    vision, language = kwargs["vision_transformer_config"], kwargs["language_transformer_config"]
    projection = kwargs["vision_projection_config"]
    drop = kwargs["drop_vision_class_token"]
    tokens = get_num_image_embeddings(
        kwargs.get("img_h", 336), kwargs.get("img_w", 336), kwargs.get("patch_dim", 14), vision.vision_model_type,
        drop, 1, kwargs.get("pixel_shuffle", False),
    )  # fmt: skip
    encoder = ModuleShape(
        VISION, "images", vision.num_layers, layer_shape(vision, causal=False),
        PatchEmbedding(kwargs.get("patch_dim", 14)),
        Projector(language.hidden_size, projection.ffn_hidden_size, 4 if kwargs.get("pixel_shuffle") else 1),
        trainable=trainable_parts(
            stem=not freeze.get("freeze_vision_model"), layers=not freeze.get("freeze_vision_model"),
            head=not freeze.get("freeze_vision_projection"),
        ),
        context_parallel="shared" if parallel.cp > 1 else "whole",
    )  # fmt: skip
    vocabulary = kwargs["language_vocab_size"]
    trained = not freeze.get("freeze_language_model")
    decoder = ModuleShape(
        LANGUAGE, "text", language.num_layers,
        layer_shape(language, causal=True, spec=kwargs["language_transformer_layer_spec"]), TokenEmbedding(vocabulary),
        LanguageHead(vocabulary, kwargs.get("share_embeddings_and_output_weights", False)), (VISION,),
        trainable_parts(stem=trained, layers=trained, head=trained),
    )  # fmt: skip
    packing = Packing(max_tokens=kwargs["language_max_sequence_length"], image_tokens=tokens)
    return MultimodalModel("llava", (encoder, decoder), parallel, packing)


def describe_gpt(kwargs: Mapping[str, Any], parallel: Parallel) -> MultimodalModel:
    """The GPT of these GPTModel arguments."""
    config, vocabulary = kwargs["config"], kwargs["vocab_size"]
    module = ModuleShape(
        LANGUAGE, "text", config.num_layers,
        layer_shape(config, causal=True, spec=kwargs["transformer_layer_spec"]), TokenEmbedding(vocabulary),
        LanguageHead(vocabulary, kwargs.get("share_embeddings_and_output_weights", False)),
        mtp=getattr(config, "mtp_num_layers", None) or 0,
    )  # fmt: skip
    return MultimodalModel("gpt", (module,), parallel, Packing(max_tokens=kwargs["max_sequence_length"]))


def describe_t2v(kwargs: Mapping[str, Any], freeze: Mapping[str, bool], parallel: Parallel) -> MultimodalModel:
    """The text-to-video model of these TextToVideoModel arguments."""
    kwargs = with_defaults(kwargs)
    text, diffusion = kwargs["text_config"], kwargs["diffusion_config"]
    hidden, channels, patch = diffusion.hidden_size, kwargs["latent_channels"], tuple(kwargs["patch"])
    reads = not freeze.get("freeze_text_encoder")
    encoder = ModuleShape(
        LANGUAGE, "text", text.num_layers, layer_shape(text, causal=True), TokenEmbedding(kwargs["vocabulary"]),
        Projector(hidden, hidden),
        trainable=trainable_parts(stem=reads, layers=reads, head=not freeze.get("freeze_text_projection")),
    )  # fmt: skip
    layer = replace(layer_shape(diffusion, causal=False), cross_attention=hidden, adaln="single")
    transformer = ModuleShape(
        DIFFUSION, "clips", diffusion.num_layers, layer,
        LatentEmbedding(channels, patch, tuple(kwargs["compression"])), LatentHead(channels, patch), (LANGUAGE,),
    )  # fmt: skip
    return MultimodalModel("t2v", (encoder, transformer), parallel)


def layer_shape(config: Any, *, causal: bool, spec: Any = None) -> TransformerLayer:
    """A transformer layer of this TransformerConfig; ``spec`` (of a layer, of each, or for each whether it has any)
    says where experts are."""
    places = spec if isinstance(spec, tuple) else layers_with_experts(spec, config.num_layers)
    linear, every = _linear_attention(config)
    return TransformerLayer(
        hidden=config.hidden_size,
        ffn=config.ffn_hidden_size,
        heads=config.num_attention_heads,
        kv_groups=config.num_query_groups or config.num_attention_heads,
        head_dim=config.kv_channels or 0,
        gated=config.gated_linear_unit,
        causal=causal,
        experts=_experts(config, places),
        linear_attention=linear,
        full_attention_every=every,
        output_gate=bool(getattr(config, "attention_output_gate", False)),
    )


def _linear_attention(config: Any) -> tuple[GatedDeltaNet | None, int]:
    """The gated delta nets of a model that has them, and how many layers come to one of full attention, which are taken
    to come at equal distances (0: none is)."""
    if getattr(config, "experimental_attention_variant", None) != "gated_delta_net":
        return None, 0
    net = GatedDeltaNet(
        config.linear_num_key_heads, config.linear_num_value_heads, config.linear_key_head_dim,
        config.linear_value_head_dim, config.linear_conv_kernel_dim,
    )  # fmt: skip
    every = config.linear_attention_freq
    if isinstance(every, int):
        return net, every
    full = sum(not linear for linear in every)
    return net, len(every) // full if full else 0


def latent_as_grouped(module: ModuleShape, config: Any) -> ModuleShape:
    """A language model of latent attention, which descriptions don't know, with a grouped one: heads as wide as its
    values, and of the numbers of keys and values that tensor-parallel ranks allow the one that comes nearest in
    parameters. Latent attention has h * (q + kv + positions) + heads * (q * (k + positions) + kv * (k + v) + h * v),
    ``q`` and ``kv`` the ranks, or h * heads * (k + positions) for what ``q`` is in, where queries have no rank (arXiv
    2405.04434); a grouped one 2 * h * v * (heads + groups)."""
    hidden, heads, values = config.hidden_size, config.num_attention_heads, config.v_head_dim
    wide, rank, positions = config.qk_head_dim, config.kv_lora_rank, config.qk_pos_emb_head_dim
    asked = heads * (wide + positions)
    queries = config.q_lora_rank * (hidden + asked) if config.q_lora_rank else hidden * asked
    latent = queries + hidden * (rank + positions) + heads * (rank * (wide + values) + hidden * values)
    tensor = config.tensor_model_parallel_size
    allowed = [groups for groups in range(tensor, heads + 1, tensor) if heads % groups == 0]
    nearest = min(allowed, key=lambda groups: abs(2 * hidden * values * (heads + groups) - latent))
    return replace(module, layer=replace(module.layer, kv_groups=nearest, head_dim=values))


def configured_experts(config: Any) -> tuple[bool, ...]:
    """Of each layer of a model that is built by its config alone, whether it has experts."""
    if not getattr(config, "num_moe_experts", None):
        return (False,) * config.num_layers
    every = config.moe_layer_freq
    if isinstance(every, int):
        return tuple(i % every == 0 for i in range(config.num_layers))
    return tuple(map(bool, every))


def _experts(config: Any, layers: tuple[bool, ...]) -> Experts | None:
    """The mixtures of experts of a model that has them in those of its layers."""
    if not any(layers):
        return None
    return Experts(
        config.num_moe_experts, config.moe_router_topk, config.moe_ffn_hidden_size or config.ffn_hidden_size,
        config.moe_shared_expert_intermediate_size or 0, pattern=(True,) if all(layers) else layers,
    )  # fmt: skip


def trainable_parts(**parts: bool) -> Any:
    """Names of the parts of a module that train."""
    return tuple(name for name, trains in parts.items() if trains)
