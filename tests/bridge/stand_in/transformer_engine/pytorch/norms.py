import torch
from torch.nn.functional import layer_norm, rms_norm


def normalized(x, weight, bias, kind, eps, zero_centered_gamma):
    """``x`` normalised over its last dimension, in float32 as the fused kernels do it."""
    scale = weight.float() + 1 if zero_centered_gamma else weight.float()
    if kind == "RMSNorm":
        return rms_norm(x.float(), scale.shape, scale, eps).to(x.dtype)
    return layer_norm(x.float(), scale.shape, scale, bias.float(), eps).to(x.dtype)


def norm_parameters(size, kind, zero_centered_gamma, sequence_parallel, **where):
    """Scale and bias of a norm that does nothing but normalise; the bias is None for RMSNorm."""
    scale = torch.nn.Parameter(torch.full((size,), 0.0 if zero_centered_gamma else 1.0, **where))
    bias = torch.nn.Parameter(torch.zeros(size, **where)) if kind == "LayerNorm" else None
    for parameter in (scale, bias):
        if parameter is not None:
            parameter.sequence_parallel = sequence_parallel
    return scale, bias


class LayerNorm(torch.nn.Module):
    kind = "LayerNorm"

    def __init__(self, normalized_shape, eps=1e-5, sequence_parallel=False, params_dtype=None,
                 zero_centered_gamma=False, device="cpu", **kwargs):  # fmt: skip
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight, self.bias = norm_parameters(
            normalized_shape, self.kind, zero_centered_gamma, sequence_parallel, dtype=params_dtype, device=device
        )

    def forward(self, x):
        return normalized(x, self.weight, self.bias, self.kind, self.eps, self.zero_centered_gamma)


class RMSNorm(LayerNorm):
    kind = "RMSNorm"
