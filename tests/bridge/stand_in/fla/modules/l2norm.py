"""Vectors of length one."""

import torch


def l2norm(x: torch.Tensor, dim: int = -1, eps: float = 1e-6) -> torch.Tensor:
    """``x`` over its length along ``dim``, computed in single precision."""
    length = x.float().square().sum(dim, keepdim=True)
    return x * torch.rsqrt(length + eps).to(x.dtype)
