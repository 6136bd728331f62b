"""The gated delta rule, with all tokens of a sample at once."""

from typing import Any

import torch


def chunk_gated_delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """``q``, ``k`` ``[b, s, heads, key channels]``, ``v`` ``[b, s, heads, value channels]``; ``g``, the logarithm of
    what is left of the state, and ``beta`` ``[b, s, heads]``. Packed samples, which begin at ``cu_seqlens``, begin
    with an empty state each."""
    lengths = [q.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
    parts = zip(*(x.float().transpose(1, 2).split(lengths, dim=2) for x in (q, k, v, g, beta)), strict=True)
    return torch.cat([_of_sample(*part) for part in parts], dim=2).transpose(1, 2).to(v.dtype), None


def _of_sample(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """``[b, heads, s, ...]`` all. The state is a sum of outer products of keys with what is written, which decays; a
    token writes ``beta`` times what the state, asked for its key, is short of its value."""
    decay = g.cumsum(-1)
    left = (decay[..., :, None] - decay[..., None, :]).tril().exp().tril()  # at a row of what a column wrote
    asked = (beta[..., None] * (k @ k.transpose(-1, -2)) * left).tril(-1)
    written = torch.linalg.solve_triangular(asked, beta[..., None] * v, upper=False, unitriangular=True)
    return (q @ k.transpose(-1, -2) * left) @ written * q.shape[-1] ** -0.5
