"""Attention over packed sequences without Transformer Engine: each sample attends to itself alone."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch

from dip_megatron.families.shared.sdpa import SdpaAttention


class PackedAttention(SdpaAttention):
    """Causal core attention over ``[tokens, heads, width]`` and the samples' bounds; returns ``[tokens, heads *
    width]``."""

    def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, *rest: Any, **kwargs: Any) -> torch.Tensor:
        bounds = kwargs["packed_seq_params"].cu_seqlens_q.tolist()
        assert bounds[-1] == query.shape[0]
        outputs = []
        for first, end in pairwise(bounds):
            parts = [t[first:end].transpose(0, 1) for t in (query, key, value)]  # [heads, sample, width]
            sample = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=self.softmax_scale)
            outputs.append(sample.transpose(0, 1).reshape(end - first, -1))
        return torch.cat(outputs)


def with_packed_attention(layer: Any) -> Any:
    """A copy of a local transformer layer's spec that takes ``packed_seq_params``."""
    changed = copy.deepcopy(layer)
    changed.submodules.self_attention.submodules.core_attention = PackedAttention
    return changed
