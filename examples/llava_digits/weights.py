"""How widely a LLaVA's initial weights are spread, by name, so that runs that cut the model differently start alike."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def deviations(std: float, output_std: float) -> Callable[[str, torch.nn.Parameter], float | None]:
    """The standard deviation of each weight by name and parameter; None for biases and norms, which are constants.

    As Megatron does it: ``output_std`` for the matrices that write into the residual stream, ``std`` for all others,
    and PyTorch's own deviations for the ViT's patch and position embeddings.
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

    return deviation
