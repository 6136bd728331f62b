"""Initial weights that don't depend on how a model is spread over ranks, so that runs can be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dip_megatron.models.weights import draw_by_name


def draw_weights_by_name(models: Sequence[torch.nn.Module], *, seed: int, std: float, output_std: float) -> None:
    """Draw every weight anew, from ``seed`` and its name; biases and norms keep their constants.

    Normally distributed as Megatron does it: ``output_std`` for the matrices that write into the residual stream,
    ``std`` for all others, and PyTorch's own deviations for the ViT's patch and position embeddings.
    """

    def deviation(name: str, parameter: torch.nn.Parameter) -> float | None:
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            return None
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            return output_std
        if name.endswith("conv1.weight"):
            return 1.0 / math.sqrt(3 * parameter[0].numel())
        if name.startswith("vision_model.") and name.endswith(("position_embeddings.weight", "class_token")):
            return 1.0
        return std

    draw_by_name(models, seed, deviation)
