"""Megatron-Core's LLaVAModel from the inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.multimodal import llava_model
from megatron.core.models.multimodal.llava_model import IGNORE_INDEX, LLaVAModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from torch.nn.functional import pad

from .names import Name, Topic

_MODULE = "megatron.core.models.multimodal.llava_model"
_MODEL = f"{_MODULE}:LLaVAModel"
TOPIC = Topic(
    "LLaVA in segments",
    "megatron-core",
    "0.16.1, 0.19.2",
    "Megatron's LLaVAModel can't be trained under DIP",
    (
        Name(f"{_MODULE}:IGNORE_INDEX"),
        Name(f"{_MODULE}:HAVE_TE"),
        Name(
            _MODEL,
            has=("_language_is_pipeline_parallel", "sequence_parallel_lm", "tensor_model_parallel_size_lm",
                 "context_parallel_lm", "cp_group", "encoder_hidden_state", "img_seq_len", "vision_model",
                 "vision_projection", "language_model", "_tile_tags"),
        ),
        Name(f"{_MODEL}._apply_tile_tagging", ("image_embeddings", "num_image_tiles")),
        Name(
            f"{_MODEL}._process_embedding_token_parallel",
            ("combined_embeddings", "new_labels", "new_loss_mask", "packed_seq_params"),
        ),
        Name(
            "megatron.core.models.vision.clip_vit_model:CLIPViTModel",
            has=("conv1", "position_embeddings", "decoder", "ln_post", "seq_length"),
        ),
    ),
)  # fmt: skip


ShardRows = Callable[[tuple[int, ...], int, int], torch.Tensor]
"""Of sequences of these lengths one after the other, the rows that one of so many context-parallel ranks has."""


class UnpaddedLLaVA(LLaVAModel):
    """A LLaVAModel that pads no sequence to the longest possible one, as Megatron does in pipelines, but, where ranks
    share it, to a length that divides: labels and loss mask too, wherever the loss is."""

    def __init__(self, *, shard_rows: ShardRows, **kwargs: Any):
        super().__init__(**kwargs)
        # Shapes travel in the plan, so nothing needs Megatron's padding.
        self._language_is_pipeline_parallel = False
        self._shard_rows = shard_rows

    def tagged(self, embeddings: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        """What encoders have made of so many tiles an image, ``[tokens, tiles, h]``, behind the embedded tags of a
        model that has tile tags. Megatron puts them there where its encoder is; the embedding is here."""
        if self._tile_tags is None:
            return embeddings
        return self._apply_tile_tagging(embeddings, tiles)  # type: ignore[no-any-return]

    def _process_embedding_token_parallel(
        self, combined_embeddings: Any, new_labels: Any, new_loss_mask: Any, packed_seq_params: Any
    ) -> Any:
        # Upstream refuses lengths that don't divide, or pads on the first stage only; and it cuts packed sequences with
        # Transformer Engine's function, which needs a GPU.
        ranks, size = self.context_parallel_lm, length_multiple(self.language_model.config)
        if combined_embeddings is not None:  # [s, b, h], or [b, s, h] to be cut
            axis = 0 if ranks == 1 else 1
            behind = -combined_embeddings.shape[axis] % size
            combined_embeddings = pad(combined_embeddings, (0, 0) + (0, 0) * (1 - axis) + (0, behind))
        if new_labels is not None:
            new_labels = pad(new_labels, (0, -new_labels.shape[1] % size), value=IGNORE_INDEX)
            new_loss_mask = pad(new_loss_mask, (0, -new_loss_mask.shape[1] % size))
        if ranks == 1:
            return super()._process_embedding_token_parallel(
                combined_embeddings, new_labels, new_loss_mask, packed_seq_params
            )
        whole = next((x for x in (combined_embeddings, new_labels) if x is not None), None)
        if whole is not None:
            rows = self._rows(whole.shape[1], packed_seq_params).to(whole.device)
            if combined_embeddings is not None:
                combined_embeddings = combined_embeddings[:, rows].transpose(1, 0).contiguous()  # [s / ranks, b, h]
                if self.sequence_parallel_lm:
                    combined_embeddings = scatter_to_sequence_parallel_region(combined_embeddings)
            if new_labels is not None:
                new_labels, new_loss_mask = new_labels[:, rows], new_loss_mask[:, rows]
        return combined_embeddings, new_labels, new_loss_mask, packed_seq_params

    def _rows(self, length: int, packed: Any) -> torch.Tensor:
        """Of a combined sequence, what this rank has. Raises ValueError for packed samples that don't fill it."""
        lengths: tuple[int, ...] = (length,)
        if packed is not None and packed.qkv_format == "thd":
            bounds = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
            lengths = tuple(bounds.diff().tolist())
        if sum(lengths) != length:
            raise ValueError(
                f"packed_seq_params end at position {sum(lengths)}, the combined sequence has {length}: with context "
                "parallelism packed samples must fill it (cu_seqlens_q_padded)"
            )
        return self._shard_rows(lengths, dist.get_world_size(self.cp_group), dist.get_rank(self.cp_group))


def length_multiple(config: Any) -> int:
    """What divides the length of a combined sequence that ranks share: those of sequence parallelism, and twice those
    of context parallelism."""
    size = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return int(size * (2 * config.context_parallel_size if config.context_parallel_size > 1 else 1))


@contextlib.contextmanager
def takes_attention(core_attention: Any) -> Iterator[None]:
    """Within, LLaVAModel is built with this core attention where it would demand Transformer Engine's, the only one of
    Megatron's that knows shards of sequences."""
    new = {"HAVE_TE": True, "TEDotProductAttention": core_attention, "is_te_min_version": lambda *_, **__: True}
    before = {name: getattr(llava_model, name) for name in new if hasattr(llava_model, name)}
    for name, value in new.items():
        setattr(llava_model, name, value)
    try:
        yield
    finally:
        for name in new:
            delattr(llava_model, name)
        for name, value in before.items():
            setattr(llava_model, name, value)


def forget_input(model: LLaVAModel) -> None:
    """Let go of what ``set_input_tensor`` gave a model: Megatron's modules hold it until they get the next."""
    model.encoder_hidden_state = None
    for part in (model.vision_model, model.language_model):
        if part is not None:
            part.decoder.input_tensor = None
