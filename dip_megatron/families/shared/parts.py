"""Small parts of modules, of Megatron-Core's own layers: what comes before and after a module's transformer layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import (
    get_vit_layer_with_local_spec,
    get_vit_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from .sdpa import with_sdpa


def encoder_layer_spec(transformer_engine: bool = False) -> ModuleSpec:
    """An encoder's layer, full attention within each packed sequence: Megatron's local ViT layer with torch's
    attention, or Transformer Engine's."""
    if transformer_engine:
        return get_vit_layer_with_transformer_engine_spec()
    return with_sdpa(get_vit_layer_with_local_spec())


def projector(width: int, config: TransformerConfig) -> MultimodalProjector:
    """Megatron's projector from a module's ``width`` to that of ``config``, its inner width too."""
    own = copy.copy(config)
    own.ffn_hidden_size = config.hidden_size
    own.gated_linear_unit = False
    own.activation_func = torch.nn.functional.gelu
    return MultimodalProjector(
        own, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear), "mlp", width
    )


def linear(config: TransformerConfig, inputs: int, outputs: int, init: Any, gather: bool = True) -> torch.nn.Module:
    """Megatron's linear with a bias, split over tensor-parallel ranks; with ``gather`` each has all of its output."""
    return ColumnParallelLinear(
        inputs, outputs, config=config, init_method=init, bias=True, gather_output=gather, skip_bias_add=False
    )


def applied(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Output of one of Megatron's linears, which return their bias beside it."""
    output: torch.Tensor = layer(x)[0]
    return output
