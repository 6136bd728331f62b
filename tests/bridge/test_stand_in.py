"""The stand-in for Transformer Engine against plain torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent / "stand_in"))

from fla.modules.convolution import causal_conv1d
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from transformer_engine import pytorch as te


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(3)


def moved(module: torch.nn.Module) -> Any:
    """The module with parameters that are no special values."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def reference_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Softmax written out, for ``[tokens, heads, channels]``; heads of k and v are shared by groups of q's."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("qhc,khc->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khc->qhc", weights, v).flatten(1)


def lower(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def projections(*shape: int, groups: int = 2) -> list[torch.Tensor]:
    """Queries of four heads, keys and values of ``groups``, of eight channels."""
    return [torch.randn(*shape, heads, 8, requires_grad=True) for heads in (4, groups, groups)]


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    linear, x = moved(te.Linear(6, 4, bias=bias)), torch.randn(3, 2, 6)
    torch.testing.assert_close(linear(x), functional.linear(x, linear.weight, linear.bias))


def test_linear_leaves_its_bias_to_the_caller() -> None:
    linear, x = moved(te.Linear(6, 4, return_bias=True)), torch.randn(3, 6)
    output, bias = linear(x)
    assert bias is linear.bias
    torch.testing.assert_close(output, functional.linear(x, linear.weight))


@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norms_alone_and_before_a_linear(kind: str, zero_centered: bool) -> None:
    x = torch.randn(3, 6)
    norm = moved(getattr(te, kind)(6, eps=1e-3, zero_centered_gamma=zero_centered))
    scale = norm.weight + 1 if zero_centered else norm.weight
    if kind == "LayerNorm":
        expected = functional.layer_norm(x, (6,), scale, norm.bias, 1e-3)
    else:
        expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * scale
    torch.testing.assert_close(norm(x), expected)

    both = moved(te.LayerNormLinear(6, 4, eps=1e-3, normalization=kind, zero_centered_gamma=zero_centered))
    with torch.no_grad():
        both.layer_norm_weight.copy_(norm.weight)
        if kind == "LayerNorm":
            both.layer_norm_bias.copy_(norm.bias)
    torch.testing.assert_close(both(x), functional.linear(expected, both.weight, both.bias))


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norms_start_by_normalising_only(kind: str) -> None:
    x = torch.randn(3, 6)
    torch.testing.assert_close(getattr(te, kind)(6)(x), getattr(te, kind)(6, zero_centered_gamma=True)(x))


def test_parameters_begin_as_the_caller_says_and_biases_at_zero() -> None:
    linear = te.Linear(6, 4, init_method=lambda weight: weight.fill_(2.0))
    assert linear.weight.eq(2).all()
    assert linear.bias.eq(0).all()


def test_grouped_linear_takes_each_group_by_its_own_weight() -> None:
    grouped, x = moved(te.GroupedLinear(3, 6, 4)), torch.randn(7, 6)
    rows = x.split([2, 0, 5])
    expected = [functional.linear(r, getattr(grouped, f"weight{i}"), getattr(grouped, f"bias{i}"))
                for i, r in enumerate(rows)]  # fmt: skip
    torch.testing.assert_close(grouped(x, [2, 0, 5]), torch.cat(expected))


@pytest.mark.parametrize("form", ["sbhd", "bshd"])
@pytest.mark.parametrize("kind", ["causal", "no_mask"])
def test_attention_of_grouped_heads(form: str, kind: str) -> None:
    attention = te.DotProductAttention(4, 8, num_gqa_groups=2, qkv_format=form, attn_mask_type=kind)
    q, k, v = projections(*((5, 3) if form == "sbhd" else (3, 5)))
    output = attention(q, k, v)
    assert output.shape == (*q.shape[:2], 32)
    allowed = lower(5, 5) if kind == "causal" else torch.ones(5, 5, dtype=torch.bool)
    for sample in range(3):
        of = (slice(None), sample) if form == "sbhd" else (sample,)
        torch.testing.assert_close(output[of], reference_attention(q[of], k[of], v[of], allowed))


def test_attention_under_a_mask_whose_true_forbids() -> None:
    attention = te.DotProductAttention(4, 8, attn_mask_type="arbitrary", qkv_format="bshd")
    q, k, v = projections(1, 5, groups=4)
    forbidden = torch.rand(1, 1, 5, 5) > 0.5
    forbidden[..., 0] = False
    expected = reference_attention(q[0], k[0], v[0], ~forbidden[0, 0])
    torch.testing.assert_close(attention(q, k, v, forbidden)[0], expected)


def test_attention_in_a_window() -> None:
    attention = te.DotProductAttention(4, 8, window_size=(1, 0), qkv_format="bshd")
    q, k, v = projections(1, 5, groups=4)
    allowed = lower(5, 5) & ~lower(5, 5).roll(2, 0).tril(-2)
    torch.testing.assert_close(attention(q, k, v)[0], reference_attention(q[0], k[0], v[0], allowed))


def test_packed_attention_keeps_to_each_sequence() -> None:
    attention = te.DotProductAttention(4, 8, num_gqa_groups=2)
    q, k, v = projections(9)
    bounds = torch.tensor([0, 3, 7])
    output = attention(
        q, k, v, qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, attn_mask_type="padding_causal"
    )
    expected = [reference_attention(q[a:b], k[a:b], v[a:b], lower(b - a, b - a)) for a, b in ((0, 3), (3, 7))]
    torch.testing.assert_close(output, torch.cat([*expected, torch.zeros(2, 32)]))
    output.sum().backward()
    assert q.grad is not None
    assert q.grad[7:].eq(0).all()


def test_what_is_missing_is_refused() -> None:
    shared = te.DotProductAttention(4, 8, cp_group=object())
    q = torch.zeros(2, 1, 4, 8)
    for refused in (
        lambda: te.GroupedLinear(2, 4, 4, tp_size=2),
        lambda: te.Linear(4, 4, fuse_wgrad_accumulation=True),
        lambda: shared(q, q, q, attn_mask_type="no_mask"),
        lambda: te.fp8_autocast(enabled=True).__enter__(),
    ):
        with pytest.raises(NotImplementedError, match="stand-in"):
            refused()


def linear_attention(tokens: int) -> dict[str, torch.Tensor]:
    """What the gated delta rule takes, of three heads."""
    keys = functional.normalize(torch.randn(1, tokens, 3, 8), dim=-1)
    return {
        "q": torch.randn(1, tokens, 3, 8), "k": keys, "v": torch.randn(1, tokens, 3, 6),
        "g": -torch.rand(1, tokens, 3), "beta": torch.rand(1, tokens, 3),
    }  # fmt: skip


def test_the_gated_delta_rule_is_megatrons() -> None:
    core = pytest.importorskip("megatron.core.ssm.gated_delta_net")
    given = linear_attention(70)
    torch.testing.assert_close(chunk_gated_delta_rule(**given)[0], core.torch_chunk_gated_delta_rule(**given)[0])


def test_packed_samples_are_each_by_itself() -> None:
    given, starts = linear_attention(9), torch.tensor([0, 4, 9])
    together, _ = chunk_gated_delta_rule(**given, cu_seqlens=starts)
    x, weight = torch.randn(1, 9, 5), torch.randn(5, 4)
    convolved, _ = causal_conv1d(x, weight, activation="silu", cu_seqlens=starts)
    for own in (slice(0, 4), slice(4, 9)):
        alone, _ = chunk_gated_delta_rule(**{name: value[:, own] for name, value in given.items()})
        torch.testing.assert_close(together[:, own], alone)
        torch.testing.assert_close(convolved[:, own], causal_conv1d(x[:, own], weight, activation="silu")[0])
    by_torch = torch.nn.Conv1d(5, 5, 4, groups=5, padding=3, bias=False)
    by_torch.weight.data = weight[:, None]
    expected = functional.silu(by_torch(x.transpose(1, 2))[..., :9].transpose(1, 2))
    torch.testing.assert_close(causal_conv1d(x, weight, activation="silu")[0], expected)
