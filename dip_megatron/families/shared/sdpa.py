"""Flash attention for Megatron's local layers, where Transformer Engine is not installed: torch's own kernels."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec

from .packing import lengths_of


class SdpaAttention(MegatronModule):
    """Core attention through ``torch.nn.functional.scaled_dot_product_attention``: never writes its score matrix on a
    GPU. Causal or full, grouped queries, packed sequences one by one; no explicit masks, windows or context
    parallelism."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.no_mask):
            raise ValueError(f"torch's attention is used causal or full, not with {attn_mask_type}")
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

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
        width]``. Packed sequences have no ``b``, and the result is ``[s, heads * width]``. Raises ValueError for biases
        and for another packing than ``thd``."""
        if attention_bias is not None:
            raise ValueError("torch's attention takes no bias; use Transformer Engine")
        causal = (self.attn_mask_type if attn_mask_type is None else attn_mask_type) == AttnMaskType.causal
        if packed_seq_params is None:
            return self._attend(query, key, value, causal)
        if packed_seq_params.qkv_format != "thd":
            raise ValueError(f"torch's attention takes sequences packed as thd, not {packed_seq_params.qkv_format}")
        queries, keys = lengths_of(packed_seq_params)
        parts = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
        attended = [self._attend(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), causal) for q, k, v in parts]
        return torch.cat(attended).squeeze(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
        length, batch, heads, width = query.shape
        if batch == 0:  # a microbatch without images
            return query.reshape(length, batch, heads * width)
        output = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=causal,
            scale=self.softmax_scale,
            dropout_p=self.attention_dropout if self.training else 0.0,
            enable_gqa=key.shape[2] != heads,
        )
        return output.permute(2, 0, 1, 3).reshape(length, batch, heads * width)


def with_sdpa(layer: ModuleSpec) -> ModuleSpec:
    """A copy of a local transformer layer's spec whose attention runs on :class:`SdpaAttention`."""
    changed = copy.deepcopy(layer)
    changed.submodules.self_attention.submodules.core_attention = SdpaAttention
    if isinstance(changed.submodules.cross_attention, ModuleSpec):
        changed.submodules.cross_attention.submodules.core_attention = SdpaAttention
    return changed
