"""Torch's attention in Megatron's layers computes what attention is defined to be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType

from dip_megatron.models.sdpa import SdpaAttention


def build(mask, width):
    config = SimpleNamespace(attention_dropout=0.0, kv_channels=width)
    return SdpaAttention(config, 1, mask, "self")


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 9), batch=st.integers(0, 3), groups=st.sampled_from([1, 2]), share=st.sampled_from([1, 3]),
    causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention(length, batch, groups, share, causal, seed):
    generator, width = torch.Generator().manual_seed(seed), 4
    draw = lambda heads: torch.randn(length, batch, heads, width, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = draw(groups * share), draw(groups), draw(groups)
    attention = build(AttnMaskType.causal if causal else AttnMaskType.no_mask, width)
    ours = attention(q, k, v, None)
    scores = torch.einsum("sbgjw,tbgw->bgjst", q.view(length, batch, groups, share, width), k) / width**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    expected = torch.einsum("bgjst,tbgw->sbgjw", scores.softmax(-1), v)
    torch.testing.assert_close(ours, expected.reshape(length, batch, groups * share * width))


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="causal or full"):
        build(AttnMaskType.padding, 4)
    x = torch.zeros(2, 1, 1, 4)
    with pytest.raises(ValueError, match="Transformer Engine"):
        build(AttnMaskType.causal, 4)(x, x, x, None, packed_seq_params=object())
