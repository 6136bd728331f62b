from . import distributed, fp8, ops
from .attention import DotProductAttention
from .fp8 import fp8_autocast, fp8_model_init
from .linear import GroupedLinear, LayerNormLinear, LayerNormMLP, Linear
from .norms import LayerNorm, RMSNorm

__all__ = [
    "DotProductAttention", "GroupedLinear", "LayerNorm", "LayerNormLinear", "LayerNormMLP", "Linear", "RMSNorm",
    "distributed", "fp8", "fp8_autocast", "fp8_model_init", "ops",
]  # fmt: skip
