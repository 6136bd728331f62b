"""Torch's attention in Megatron's layers computes what attention is defined to be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from dip_megatron.families.shared.packing import pack
from dip_megatron.families.shared.sdpa import SdpaAttention
from tests.drawn import settings


def build(mask, width, **settings):
    config = SimpleNamespace(attention_dropout=0.0, kv_channels=width, **settings)
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
    with pytest.raises(ValueError, match=r"no windows \(window_size \(8, 0\)\)"):
        build(AttnMaskType.causal, 4, window_size=(8, 0))
    with pytest.raises(ValueError, match="no softmax_type learnable"):
        build(AttnMaskType.causal, 4, softmax_type="learnable")
    build(AttnMaskType.causal, 4, window_size=(-1, 0), softmax_type="vanilla")
    x = torch.zeros(2, 1, 1, 4)
    with pytest.raises(ValueError, match="Transformer Engine"):
        build(AttnMaskType.causal, 4)(x, x, x, None, attention_bias=x)
    with pytest.raises(ValueError, match="packed as thd, not sbhd"):
        build(AttnMaskType.causal, 4)(x, x, x, None, packed_seq_params=PackedSeqParams(qkv_format="sbhd"))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4), cross=st.booleans(),
    causal=st.booleans(), megatrons=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_packed_sequences_attend_to_themselves(lengths, cross, causal, megatrons, seed):
    generator, width = torch.Generator().manual_seed(seed), 4
    queries, keys = zip(*(pair if cross else (pair[0], pair[0]) for pair in lengths), strict=True)
    draw = lambda total, heads: torch.randn(total, heads, width, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = draw(sum(queries), 6), draw(sum(keys), 2), draw(sum(keys), 2)
    packed = pack(queries, torch.device("cpu"), keys).cross
    assert packed is not None
    if megatrons:
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=packed.cu_seqlens_q, cu_seqlens_kv=packed.cu_seqlens_kv)
    attention = build(AttnMaskType.causal if causal and not cross else AttnMaskType.no_mask, width)
    ours = attention(q, k, v, None, packed_seq_params=packed)
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    expected = [attention(*(x.unsqueeze(1) for x in part), None).squeeze(1) for part in parts]
    torch.testing.assert_close(ours, torch.cat(expected))
