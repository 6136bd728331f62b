"""Flash attention for Megatron's local layers, where Transformer Engine is not installed: torch's own kernels."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.nn.attention.bias import causal_lower_right

from .packing import lengths_of, shares_of
from .shards import whole_order


class SdpaAttention(MegatronModule):
    """Core attention through ``torch.nn.functional.scaled_dot_product_attention``: never writes its score matrix on a
    GPU. Causal or full, grouped queries, packed sequences one by one; no explicit masks or windows. Context-parallel
    ranks, of which each has a shard of the queries (:mod:`.shards`), gather all keys and values."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ):
        super().__init__(config=config)
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
            raise ValueError(f"torch's attention is used causal or full, not with {attn_mask_type}")
        window = getattr(config, "window_size", None)
        if window is not None and window[0] >= 0:
            raise ValueError(f"torch's attention knows no windows (window_size {window}); use Transformer Engine")
        if getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise ValueError(f"torch's attention knows no softmax_type {config.softmax_type}; use Transformer Engine")
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self._context = None
        if getattr(config, "context_parallel_size", 1) > 1 and attention_type == "self":
            given = getattr(pg_collection, "cp", None)
            self._context = parallel_state.get_context_parallel_group() if given is None else given

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """``query`` ``[s, b, heads, width]``, ``key`` and ``value`` ``[s, b, groups, width]``; returns ``[s, b, heads *
        width]``. Packed sequences have no ``b``, and the result is ``[s, heads * width]``. Raises ValueError for
        biases, for another packing than ``thd``, and for sequences that context-parallel ranks can't share."""
        if attention_bias is not None:
            raise ValueError("torch's attention takes no bias; use Transformer Engine")
        causal = (self.attn_mask_type if attn_mask_type is None else attn_mask_type) == AttnMaskType.causal
        if packed_seq_params is not None and packed_seq_params.qkv_format != "thd":
            raise ValueError(f"torch's attention takes sequences packed as thd, not {packed_seq_params.qkv_format}")
        if self._context is not None:
            ranks = dist.get_world_size(self._context)
            if packed_seq_params is None:
                return self._over_context(query, key, value, (query.shape[0],), (query.shape[0] * ranks,), causal)
            here, lengths = shares_of(packed_seq_params, ranks)
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
            return self._over_context(query, key, value, here, lengths, causal).squeeze(1)
        if packed_seq_params is None:
            return self._attend(query, key, value, causal)
        queries, keys = lengths_of(packed_seq_params)
        parts = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
        attended = [self._attend(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), causal) for q, k, v in parts]
        return torch.cat(attended).squeeze(1)

    def _over_context(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, here: Sequence[int],
        lengths: Sequence[int], causal: bool,
    ) -> torch.Tensor:  # fmt: skip
        """Of each sequence this rank has ``here`` rows; ``lengths`` are those of the whole ones, without what stands
        behind them so that they can be shared."""
        group = self._context
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), True, group)
        padded = tuple(own * ranks for own in here)
        keys, values = both[whole_order(padded, ranks, both.device)].chunk(2, dim=-1)
        parts = zip(query.split(list(here)), keys.split(padded), values.split(padded), lengths, strict=True)
        out: list[torch.Tensor] = []
        for q, k, v, length in parts:
            if not causal:
                out.append(self._attend(q, k[:length], v[:length], False))
                continue
            piece = len(q) // 2
            for own, place in zip(q.split(piece), (rank, 2 * ranks - 1 - rank), strict=True):
                seen = piece * (place + 1)
                out.append(self._attend(own, k[:seen], v[:seen], True))
        return torch.cat(out)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
        """Causal: the last query is that of the last key."""
        length, batch, heads, width = query.shape
        if batch == 0:  # a microbatch without images
            return query.reshape(length, batch, heads * width)
        output = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=causal_lower_right(length, key.shape[0]) if causal and length != key.shape[0] else None,
            is_causal=causal and length == key.shape[0],
            scale=self.softmax_scale,
            dropout_p=self.attention_dropout if self.training else 0.0,
            enable_gqa=key.shape[2] != heads,
        )
        return output.permute(2, 0, 1, 3).reshape(length, batch, heads * width)


def core_attention(layer: Any) -> Any:
    """The core of a layer's self-attention by its spec (the first layer's, where it lists several); None where it has
    none."""
    first = (getattr(layer, "layer_specs", None) or [layer])[0]
    attention = getattr(getattr(first, "submodules", None), "self_attention", None)
    return getattr(getattr(attention, "submodules", None), "core_attention", None)


def with_sdpa(layer: ModuleSpec) -> ModuleSpec:
    """A copy of a local transformer layer's spec whose attention is torch's: causal or full, grouped queries, packed
    sequences; also over context-parallel ranks, which Megatron's own local attention can't."""
    changed = copy.deepcopy(layer)
    changed.submodules.self_attention.submodules.core_attention = SdpaAttention
    if isinstance(changed.submodules.cross_attention, ModuleSpec):
        changed.submodules.cross_attention.submodules.core_attention = SdpaAttention
    return changed
