"""A LLaVA or a GPT of any described size with batches to match, to be measured rather than used: drawn weights, drawn
tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from ..describe.model import LanguageHead, MultimodalModel, PatchEmbedding, Projector, TransformerLayer
from ..describe.workload import Microbatch
from ..families.shared.sdpa import with_sdpa
from ..families.shared.shapes import LANGUAGE, VISION
from ..families.shared.weights import draw_by_name

IMAGE = -200


def llava_arguments(model: MultimodalModel, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of Megatron's LLaVAModel for a described vision-language model (``vision`` feeding
    ``language``), with local layers and torch's flash attention. Raises ValueError for what LLaVAModel is not."""
    if [m.name for m in model.modules] != [VISION, LANGUAGE] or model.parallel.tp != 1:
        raise ValueError(f"{model.name}: must be a vision and a language module with tp 1 to be built as a LLaVA")
    vision, language = model.module(VISION), model.module(LANGUAGE)
    if not isinstance(vision.stem, PatchEmbedding) or not isinstance(vision.head, Projector):
        raise ValueError(f"{model.name}: vision needs a patch embedding and a projector")
    if not isinstance(language.head, LanguageHead) or vision.head.reduction not in (1, 4):
        raise ValueError(f"{model.name}: LLaVA's projector merges 1 or 4 patches, and its LLM has a language head")
    patches = model.packing.image_tokens * vision.head.reduction
    side = math.isqrt(patches) * vision.stem.patch
    if (side // vision.stem.patch) ** 2 != patches:
        raise ValueError(f"{model.name}: {patches} patches an image are no square")
    vision_config = _config(vision.layer, vision.layers, model.parallel.pp, dtype)
    vision_config.vision_model_type = "clip"
    projection = _config(language.layer, 1, 1, dtype)
    projection.gated_linear_unit, projection.add_bias_linear = False, True
    projection.activation_func = torch.nn.functional.gelu
    projection.ffn_hidden_size = vision.head.inner
    language_spec = with_sdpa(decoder_model_with_local_default_spec(None, False))
    return {
        "language_transformer_config": _config(language.layer, language.layers, model.parallel.pp, dtype),
        "language_transformer_layer_spec": language_spec,
        "language_vocab_size": language.head.vocabulary,
        "language_max_sequence_length": model.packing.max_tokens,
        "language_position_embedding_type": "rope",
        "vision_transformer_config": vision_config,
        "vision_transformer_layer_spec": with_sdpa(get_vit_layer_with_local_spec()),
        "drop_vision_class_token": True,
        "vision_projection_config": projection,
        "vision_projection_layer_spec": _submodules(language_spec.submodules.mlp),
        "vision_projection_type": "mlp",
        "parallel_output": True,
        "share_embeddings_and_output_weights": False,
        "img_h": side,
        "img_w": side,
        "patch_dim": vision.stem.patch,
        "pixel_shuffle": vision.head.reduction == 4,
    }


def gpt_arguments(model: MultimodalModel, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of Megatron's GPTModel for a described text-only model, with local layers and torch's flash
    attention. Raises ValueError for what GPTModel is not."""
    language = model.modules[-1]
    if len(model.modules) != 1 or not isinstance(language.head, LanguageHead) or model.parallel.tp != 1:
        raise ValueError(f"{model.name}: must be one module with a language head and tp 1 to be built as a GPT")
    return {
        "config": _config(language.layer, language.layers, model.parallel.pp, dtype),
        "transformer_layer_spec": with_sdpa(get_gpt_layer_local_spec()),
        "vocab_size": language.head.vocabulary,
        "max_sequence_length": model.packing.max_tokens,
        "position_embedding_type": "rope",
        "parallel_output": True,
        "share_embeddings_and_output_weights": False,
    }


def _submodules(spec: Any) -> Any:
    """Of a ModuleSpec, or of the partial function that stands for one from 0.19 on."""
    return spec.submodules if hasattr(spec, "submodules") else spec.keywords["submodules"]


def _config(layer: TransformerLayer, layers: int, ranks: int, dtype: torch.dtype) -> TransformerConfig:
    gated: dict[str, Any] = {"normalization": "LayerNorm", "activation_func": torch.nn.functional.gelu}
    if layer.gated:
        gated = {"normalization": "RMSNorm", "activation_func": torch.nn.functional.silu}
    return TransformerConfig(
        num_layers=layers, hidden_size=layer.hidden, ffn_hidden_size=layer.ffn, num_attention_heads=layer.heads,
        num_query_groups=layer.kv_groups, kv_channels=layer.head_dim, gated_linear_unit=layer.gated,
        add_bias_linear=not layer.gated, hidden_dropout=0.0, attention_dropout=0.0, bf16=dtype == torch.bfloat16,
        params_dtype=dtype, pipeline_dtype=dtype, pipeline_model_parallel_size=ranks, perform_initialization=False,
        calculate_per_token_loss=True, deallocate_pipeline_outputs=True, masked_softmax_fusion=False,
        bias_activation_fusion=False, bias_dropout_fusion=False, persist_layer_norm=False,
        gradient_accumulation_fusion=False, apply_rope_fusion=False, **gated,
    )  # fmt: skip


def wrap(chunks: Sequence[torch.nn.Module], device: torch.device) -> list[torch.nn.Module]:
    """On the device, in the model's precision, with Megatron's float32 gradient buffers."""
    wrapped = []
    for chunk in chunks:
        chunk.to(device)
        if chunk.config.bf16:
            chunk.bfloat16()
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
        wrapped.append(DistributedDataParallel(chunk.config, settings, chunk))
    return wrapped


def draw_weights(parts: Sequence[torch.nn.Module], seed: int) -> None:
    """The same weights however the model is cut: each drawn from its name in the whole model, on its own device.
    ``parts`` are LLaVAModel pieces."""

    def deviation(name: str, _: torch.nn.Parameter) -> float | None:
        return None if name.endswith("bias") or "norm" in name or "ln_" in name else 0.02

    draw_by_name(parts, seed, deviation)
    for part in parts:
        for name, parameter in part.named_parameters():
            if deviation(name, parameter) is None:
                torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)


def draw_batch(
    microbatch: Microbatch, arguments: dict[str, Any], device: torch.device, seed: int
) -> dict[str, torch.Tensor]:
    """Model inputs that hold what ``microbatch`` counts: one sequence, its images at drawn places."""
    generator = torch.Generator().manual_seed(seed)
    count, vocabulary = len(microbatch.images), arguments["language_vocab_size"]
    length = microbatch.text_tokens + count
    ids = torch.randint(0, vocabulary, (1, length), generator=generator)
    ids[0, torch.randperm(length, generator=generator)[:count]] = IMAGE
    labels = torch.randint(0, vocabulary, (1, length), generator=generator)
    pixels = torch.randn(count, 3, arguments["img_h"], arguments["img_w"], generator=generator)
    batch = {
        "images": pixels.to(arguments["language_transformer_config"].params_dtype),
        "tokens": ids,
        "labels": labels,
        "loss_mask": (ids != IMAGE).float(),
        "position_ids": torch.arange(length).unsqueeze(0),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def forward_step(data_iterator: Iterator[Any], model: Any) -> Any:
    """A pretrain script's forward_step: one microbatch, summed loss and number of tokens."""
    item = next(data_iterator)
    output, loss_mask = model(
        item["images"], item["tokens"], item["position_ids"], None, item["labels"], item["loss_mask"]
    )
    return output, partial(_loss, loss_mask)


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> Any:
    total = (losses.float() * mask.float()).sum()
    tokens = mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach().clone(), tokens.float()])}


def draw_text(tokens: int, arguments: dict[str, Any], device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """A GPT's inputs: one sequence."""
    ids = torch.randint(0, arguments["vocab_size"], (1, tokens + 1), generator=torch.Generator().manual_seed(seed))
    batch = {
        "tokens": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "loss_mask": torch.ones(1, tokens),
        "position_ids": torch.arange(tokens).unsqueeze(0),
    }  # fmt: skip
    return {name: tensor.to(device) for name, tensor in batch.items()}


def gpt_forward_step(data_iterator: Iterator[Any], model: Any) -> Any:
    """:func:`forward_step` of a GPT."""
    item = next(data_iterator)
    output = model(item["tokens"], item["position_ids"], None, labels=item["labels"], loss_mask=item["loss_mask"])
    return output, partial(_loss, item["loss_mask"])
