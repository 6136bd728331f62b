"""A tiny text-only GPT on real processes: Megatron's own schedules, and ours on the same weights and batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tests.runtime.llava_case import (
    VOCABULARY,
    Case,
    config,
    gradients,
    initialize,
    packed_parameters,
    seed_parameter,
    seed_parameters,
)

LENGTH = 16


@dataclass(frozen=True)
class GptCase:
    """What to train: microbatches, layers per chunk, Megatron options. ``rows``: samples of each microbatch, if they
    aren't always ``micro_batch_size``. ``packed``: three samples are packed in each sequence."""

    microbatches: int
    layers: tuple[tuple[int, ...], ...] = ((1, 1),)
    micro_batch_size: int = 1
    tied: bool = False
    rotary: bool = False
    recompute: bool = False
    per_token_loss: bool = False
    rows: tuple[int, ...] = ()
    packed: bool = False


def gpt_kwargs(case: GptCase, pp: int) -> dict[str, Any]:
    """Keyword arguments of Megatron's GPTModel."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from tests.runtime.packed_attention import with_packed_attention

    options = Case((), recompute=case.recompute, per_token_loss=case.per_token_loss)
    spec = get_gpt_layer_local_spec()
    return {
        "config": config(options, sum(map(sum, case.layers)), pp),
        "transformer_layer_spec": with_packed_attention(spec) if case.packed else spec,
        "vocab_size": VOCABULARY,
        "max_sequence_length": LENGTH,
        "share_embeddings_and_output_weights": case.tied,
        "position_embedding_type": "rope" if case.rotary else "learned_absolute",
    }


def batches(case: GptCase) -> list[dict[str, torch.Tensor]]:
    found = []
    for index in range(case.microbatches):
        generator = torch.Generator().manual_seed(index)
        samples = case.rows[index] if case.rows else case.micro_batch_size
        ids = torch.randint(0, VOCABULARY, (samples, LENGTH + 1), generator=generator)
        found.append({
            "tokens": ids[:, :-1], "labels": ids[:, 1:],
            "loss_mask": (torch.rand(ids[:, 1:].shape, generator=generator) < 0.8).float(),
            "position_ids": torch.arange(LENGTH).expand(samples, -1),
        })  # fmt: skip
        if case.packed:
            found[-1]["bounds"] = torch.tensor([0, 3 + index, 9, LENGTH], dtype=torch.int32)
    return found


def forward_step(data_iterator: Any, model: Any) -> Any:
    """In the manner of upstream's pretrain_gpt.py."""
    item = next(data_iterator)
    output = model(
        item["tokens"], item["position_ids"], None, labels=item["labels"], loss_mask=item["loss_mask"],
        packed_seq_params=packed_parameters(item),
    )  # fmt: skip

    def loss_func(mask: torch.Tensor, losses: torch.Tensor) -> Any:
        total = (losses.float() * mask).sum()
        tokens = mask.sum().to(torch.int)
        return total, tokens, {"lm loss": torch.stack([total.detach().clone(), tokens.float()])}

    return output, partial(loss_func, item["loss_mask"])


def seed_chunks(chunks: list[torch.nn.Module]) -> None:
    """The same weights whatever the partition; a tied head gets the embedding's."""
    seed_parameters(chunks)
    for chunk in chunks:
        if chunk.share_embeddings_and_output_weights and chunk.post_process and not chunk.pre_process:
            seed_parameter(chunk.output_layer.weight, "embedding.word_embeddings.weight")


def megatrons(rank: int, world: int, case: GptCase, virtual: bool) -> Any:
    """Losses and gradients of Megatron's own run: PP1 or 1F1B, or with ``virtual`` its interleaved schedule, whose
    layers must be even."""
    initialize(world)
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from tests.runtime.split_case import with_ddp

    kwargs = gpt_kwargs(case, world)
    segments = len(case.layers) if virtual else 1
    settings = kwargs["config"]
    if virtual:
        # Two ranks need overlapped sends, which free what is under way still unless told not to (megatron-core 0.16).
        settings.virtual_pipeline_model_parallel_size = segments
        settings.overlap_p2p_comm, settings.batch_p2p_comm = True, False
        settings.deallocate_pipeline_outputs = False
        parallel_state.set_virtual_pipeline_model_parallel_world_size(segments)
    try:
        chunks = [
            GPTModel(
                **kwargs, vp_stage=k if virtual else None,
                pre_process=rank == 0 and k == 0, post_process=rank == world - 1 and k == segments - 1,
            )
            for k in range(segments)
        ]  # fmt: skip
        seed_chunks(chunks)
        chunks = with_ddp(chunks, overlap=False)
        finalize(chunks)
        losses = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=[iter(batches(case)) for _ in chunks], model=chunks,
            num_microbatches=case.microbatches, seq_length=LENGTH, micro_batch_size=case.micro_batch_size,
            decoder_seq_length=LENGTH, forward_only=False,
        )  # fmt: skip
    finally:
        if virtual:
            parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    return losses, gradients(chunks)


def finalize(chunks: list[torch.nn.Module]) -> None:
    """Let schedules end as Megatron's training does: tied gradients added up, divided by the number of tokens."""
    from megatron.core.distributed import finalize_model_grads

    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
