"""Initial weights that don't depend on how a model is spread over ranks, so that runs can be compared.

Megatron draws weights in the order a rank builds them, from a seed that differs by pipeline stage.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from megatron.core import parallel_state


def global_name(model: torch.nn.Module, name: str) -> str:
    """A parameter's name with its layer counted over the whole model, and without the names of wrappers."""
    parts = name.split(".")
    if "layers" in parts:
        place = parts.index("layers") + 1
        layers = model.get_submodule(".".join(parts[:place]))
        parts[place] = str(layers[int(parts[place])].layer_number - 1)  # type: ignore[index]
    while parts[0] == "module":
        parts.pop(0)
    if parts[-2:] == ["output_layer", "weight"] and model.get_parameter(name).__dict__.get("shared_embedding"):
        parts[-2:] = ["embedding", "word_embeddings", "weight"]  # the last stage's copy of a tied embedding
    return ".".join(parts)


def draw_weights_by_name(models: Sequence[torch.nn.Module], *, seed: int, std: float, output_std: float) -> None:
    """Draw every weight anew, from ``seed`` and its name; biases and norms keep their constants.

    Normally distributed as Megatron does it: ``output_std`` for the matrices that write into the residual stream,
    ``std`` for all others, and PyTorch's own deviations for the ViT's patch and position embeddings.
    """
    for model in models:
        for local_name, parameter in model.named_parameters():
            name = global_name(model, local_name)
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                continue
            deviation = std
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                deviation = output_std
            elif name.endswith("conv1.weight"):
                deviation = 1.0 / math.sqrt(3 * parameter[0].numel())
            elif name.startswith("vision_model.") and name.endswith(("position_embeddings.weight", "class_token")):
                deviation = 1.0
            shape = list(parameter.shape)
            shards = parallel_state.get_tensor_model_parallel_world_size()
            split = getattr(parameter, "partition_dim", -1) if shards > 1 else -1
            if split >= 0:
                shape[split] *= shards
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            drawn = torch.randn(shape, generator=generator) * deviation
            if split >= 0:
                drawn = drawn.chunk(shards, split)[parallel_state.get_tensor_model_parallel_rank()]
            with torch.no_grad():
                parameter.copy_(drawn)
