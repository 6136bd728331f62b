"""A causal convolution of each channel by itself."""

from typing import Any

import torch
from torch.nn import functional


def causal_conv1d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None,
    cu_seqlens: torch.Tensor | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """``x`` ``[b, s, d]``, ``weight`` ``[d, w]``; of packed samples, which begin at ``cu_seqlens``, each by itself."""
    channels, width = weight.shape
    parts = [x] if cu_seqlens is None else list(x.split(cu_seqlens.diff().tolist(), dim=1))
    made = [
        functional.conv1d(
            functional.pad(part.transpose(1, 2), (width - 1, 0)), weight[:, None], bias, groups=channels
        ).transpose(1, 2)
        for part in parts
    ]  # fmt: skip
    joined = torch.cat(made, dim=1)
    return functional.silu(joined) if activation in ("silu", "swish") else joined, None
