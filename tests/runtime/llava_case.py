"""A tiny LLaVA on real processes: Megatron's own schedules and ours on the same weights and batches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dip_megatron.megatron.cpu import install_cpu_platform

IMAGE = -200
VOCABULARY = 64
HIDDEN = 32
TEXT = 12
TAGS = [[10 + tile, 1, 2, 3, 4] for tile in range(5)]
"""Of the tiles of an image by number, and of its thumbnail, which is last."""


@dataclass(frozen=True)
class Case:
    """What to train: images per microbatch beside ``text`` tokens, layers per chunk, sub-microbatch size, Megatron
    options. ``packed``: samples packed in each sequence end at multiples of so many tokens (0: one sample). ``tagged``:
    images are the tiles of one image, each behind its tag. ``rows``: samples of each microbatch, if they aren't always
    ``micro_batch_size``."""

    images: tuple[int, ...]
    vision: tuple[tuple[int, ...], ...] = ((1, 1),)
    language: tuple[tuple[int, ...], ...] = ((1, 1),)
    unit_size: int = 2
    micro_batch_size: int = 1
    recompute: bool = False
    per_token_loss: bool = False
    deallocate: bool = True
    freeze: tuple[str, ...] = ()
    packed: int = 0
    sparse: bool = False
    text: int = TEXT
    context: int = 1
    rotary: bool = False
    tagged: bool = False
    rows: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[int, int]:
        return sum(map(sum, self.vision)), sum(map(sum, self.language))


def initialize(pp: int, tp: int = 1, cp: int = 1) -> None:
    """torch.distributed and Megatron's groups on this process."""
    install_cpu_platform()
    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.model_parallel_is_initialized():
        return
    # Another test of these processes may have begun without Megatron.
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        get_embedding_ranks=lambda ranks: [ranks[0], ranks[-1]] if len(ranks) > 1 else ranks,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(7)


def config(case: Case, layers: int, pp: int, **more: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    recompute: dict[str, Any] = {}
    if case.recompute:
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    built = TransformerConfig(
        num_layers=layers, hidden_size=HIDDEN, num_attention_heads=4, ffn_hidden_size=48, use_cpu_initialization=True,
        pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32, hidden_dropout=0.0, attention_dropout=0.0,
        calculate_per_token_loss=case.per_token_loss, deallocate_pipeline_outputs=case.deallocate,
        masked_softmax_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False,
        persist_layer_norm=False, gradient_accumulation_fusion=False, **recompute, **more,
    )  # fmt: skip
    return built


def llava_kwargs(case: Case, pp: int) -> dict[str, Any]:
    """Keyword arguments of Megatron's LLaVAModel."""
    from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec

    vision, language = config(case, case.layers[0], pp), config(case, case.layers[1], pp)
    language.context_parallel_size = case.context
    vision.vision_model_type = "clip"
    projection = config(case, 1, 1)
    spec = decoder_model_with_local_default_spec(None, False)
    if case.context > 1:
        from dip_megatron.families.shared.sdpa import with_sdpa

        spec = with_sdpa(spec)
    elif case.packed:
        from tests.runtime.packed_attention import with_packed_attention

        spec = with_packed_attention(spec)
    mlp = spec.submodules.mlp
    mlp_modules = mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]
    tags = {"tile_tags": TAGS, "tokenizer_type": "chatml", "max_num_tiles": len(TAGS) - 1} if case.tagged else {}
    return {
        **tags,
        "language_transformer_config": language,
        "language_transformer_layer_spec": spec,
        "language_vocab_size": VOCABULARY,
        "language_max_sequence_length": TEXT + (10 if case.tagged else 5) * max(case.images, default=0) * 2 + 8,
        "vision_transformer_config": vision,
        "vision_transformer_layer_spec": get_vit_layer_with_local_spec(),
        "drop_vision_class_token": True,
        "vision_projection_config": projection,
        "vision_projection_layer_spec": mlp_modules,
        "vision_projection_type": "mlp",
        "parallel_output": True,
        "language_position_embedding_type": "rope" if case.rotary or case.tagged else "learned_absolute",
        "img_h": 8,
        "img_w": 8,
        "patch_dim": 4,
    }


def global_name(chunk: torch.nn.Module, name: str) -> str:
    """A parameter's name with layers counted over the whole module."""
    parts = name.split(".")
    if "layers" in parts:
        at = parts.index("layers")
        block = chunk.get_submodule(".".join(parts[: at + 1]))
        layer = block[int(parts[at + 1])]
        if hasattr(layer, "layer_number"):  # Hugging Face's stand under their own
            parts[at + 1] = str(layer.layer_number - 1)
    return ".".join(parts)


def seed_parameters(chunks: list[torch.nn.Module]) -> None:
    """The same weights whatever the partition: drawn from each parameter's global name."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            seed_parameter(parameter, global_name(chunk, name))


seed_chunks = seed_parameters


def seed_parameter(parameter: torch.nn.Parameter, name: str) -> None:
    """Weights drawn from a name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    with torch.no_grad():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.05
        is_norm = "norm" in name or "ln_" in name
        parameter.copy_(noise + (1.0 if is_norm and name.endswith("weight") else 0.0))


def batch(index: int, images: int, micro_batch_size: int, seed: int = 0, text: int = TEXT) -> dict[str, torch.Tensor]:
    """One microbatch: ``images`` image tokens spread over each sample's text."""
    generator = torch.Generator().manual_seed(1000 * seed + index)
    ids = torch.randint(0, VOCABULARY, (micro_batch_size, text + images), generator=generator)
    for sample in range(micro_batch_size):
        places = torch.randperm(text + images, generator=generator)[:images]
        ids[sample, places] = IMAGE
    labels = torch.randint(0, VOCABULARY, ids.shape, generator=generator)
    return {
        "images": torch.randn(images * micro_batch_size, 3, 8, 8, generator=generator),
        "tokens": ids,
        "labels": labels,
        "loss_mask": (torch.rand(ids.shape, generator=generator) < 0.8).float(),
        "position_ids": torch.arange(ids.shape[1]).expand(micro_batch_size, -1).contiguous(),
    }


def batches(case: Case, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    marks = [min(n, 1) if case.tagged else n for n in case.images]
    rows = case.rows or (case.micro_batch_size,) * len(marks)
    items = [batch(i, n, samples, seed, case.text) for i, (n, samples) in enumerate(zip(marks, rows, strict=True))]
    if case.tagged:
        for index, (item, tiles) in enumerate(zip(items, case.images, strict=True)):
            item["images"] = torch.randn(tiles, 3, 8, 8, generator=torch.Generator().manual_seed(1000 * seed + index))
            item["tiles"] = torch.tensor([tiles] if tiles else [], dtype=torch.int)
    if case.packed:
        for item, images in zip(items, case.images, strict=True):
            item["bounds"] = sample_bounds(images, case.packed)
    return items


def sample_bounds(images: int, step: int = 1) -> torch.Tensor:
    """Where samples begin and end in a packed sequence: three, across text and image embeddings alike, at multiples of
    ``step`` tokens."""
    total = TEXT + 4 * images
    first, second = (n - n % step for n in (5, total // 3))
    return torch.tensor([0, first, first + second, total], dtype=torch.int32)


def packed_parameters(item: dict[str, torch.Tensor]) -> Any:
    """As scripts make them for Transformer Engine's attention; None for one sample a sequence."""
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = item.get("bounds")
    if bounds is None:
        return None
    longest = int(bounds.diff().max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def forward_step(data_iterator: Any, model: Any) -> Any:
    """In the manner of upstream's pretrain_vlm.py."""
    item = next(data_iterator)
    output, loss_mask = model(
        item["images"], item["tokens"], item["position_ids"], None, item["labels"], item["loss_mask"],
        num_image_tiles=item.get("tiles"), packed_seq_params=packed_parameters(item),
    )  # fmt: skip

    def loss_func(mask: torch.Tensor, losses: torch.Tensor) -> Any:
        total = (losses.float() * mask.float()).sum()
        tokens = mask.sum().to(torch.int)
        return total, tokens, {"lm loss": torch.stack([total.detach().clone(), tokens.float()])}

    return output, partial(loss_func, loss_mask)


def sparse_forward_step(rank: int, world: int, data_iterator: Any, model: Any) -> Any:
    """In the manner of upstream's examples/multimodal: ranks in the middle get no batch, the last one no pixels."""

    def passed(images: Any, *rest: Any, **more: Any) -> Any:
        if 0 < rank < world - 1:
            images, rest, more = None, (None,) * len(rest), dict.fromkeys(more)
        if rank == world - 1:
            more["num_image_tiles"] = torch.ones(images.shape[0], dtype=torch.int)
            images = None
        return model(images, *rest, **more)

    if data_iterator is None:
        passed(None, None, None, None, None, None, packed_seq_params=None)
    return forward_step(data_iterator, passed)


def gradients(chunks: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Gradient of every parameter by global name; zeros where there is none."""
    out = {}
    for wrapped in chunks:
        chunk = wrapped
        while hasattr(chunk, "module"):
            chunk = chunk.module
        for name, p in chunk.named_parameters():
            if p.requires_grad:
                grad = getattr(p, "main_grad", None)
                if grad is None:
                    grad = p.grad if p.grad is not None else torch.zeros_like(p)
                out[global_name(chunk, name)] = grad.detach().clone()
    return out


def reference(rank: int, world: int, case: Case, seed: int = 0) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Megatron's own run: PP1, or its 1F1B with the ViT on the first stage."""
    initialize(world)
    from megatron.core.enums import ModelType
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    kwargs = llava_kwargs(case, world)
    kwargs["vision_transformer_config"].pipeline_model_parallel_size = 1
    model = LLaVAModel(
        **kwargs, pre_process=rank == 0, post_process=rank == world - 1, add_encoder=rank == 0, add_decoder=True
    )
    model.freeze(**freeze_arguments(case))
    model.model_type = ModelType.encoder_or_decoder
    model.config.finalize_model_grads_func = finalize_without_ddp
    seed_parameters([model])
    longest = kwargs["language_max_sequence_length"]
    losses = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(batches(case, seed)), model=[model],
        num_microbatches=len(case.images), seq_length=longest, micro_batch_size=case.micro_batch_size,
        decoder_seq_length=longest, forward_only=False,
    )  # fmt: skip
    return losses, gradients([model])


def finalize_without_ddp(model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **_: Any) -> None:
    """What finalize_model_grads does with num_tokens, for modules without DDP."""
    if num_tokens is None:
        return
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.broadcast(num_tokens, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    for chunk in model:
        for p in chunk.parameters():
            if p.grad is not None:
                p.grad /= num_tokens


def freeze_arguments(case: Case) -> dict[str, bool]:
    return {f"freeze_{n}": n in case.freeze for n in ("language_model", "vision_model", "vision_projection")}
