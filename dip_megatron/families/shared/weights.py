"""Weights by their names in the whole model, however it is cut: to draw them, and to bring them together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

Deviation = Callable[[str, torch.nn.Parameter], float | None]


def global_name(model: torch.nn.Module, name: str) -> str:
    """A parameter's name with its layer and its expert counted over the whole model, and without the names of
    Megatron's wrappers."""
    parts = name.split(".")
    if "local_experts" in parts:
        place = parts.index("local_experts") + 1
        experts: Any = model.get_submodule(".".join(parts[:place]))
        parts[place] = str(int(parts[place]) + parallel_state.get_expert_model_parallel_rank() * len(experts))
    if "layers" in parts:
        place = parts.index("layers") + 1
        layers: Any = model.get_submodule(".".join(parts[:place]))
        layer: Any = layers[int(parts[place])]
        if hasattr(layer, "layer_number"):  # Hugging Face's stand under their own
            parts[place] = str(layer.layer_number - 1)
    while parts[0] == "module":
        parts.pop(0)
    if parts[-2:] == ["output_layer", "weight"] and model.get_parameter(name).__dict__.get("shared_embedding"):
        parts[-2:] = ["embedding", "word_embeddings", "weight"]  # the last stage's copy of a tied embedding
    return ".".join(parts)


def draw_by_name(models: Iterable[torch.nn.Module], seed: int, deviation: Deviation) -> None:
    """Draw weights anew, from ``seed`` and their global names, normally distributed.

    Megatron draws them in the order in which a rank builds them. ``deviation(name, parameter)`` is None for what stays
    as it is. Tensor-parallel ranks get their shards of the same weights, expert-parallel ones their experts of all.
    """
    dense = experts = 0, 1
    if parallel_state.model_parallel_is_initialized():
        state = parallel_state
        dense = state.get_tensor_model_parallel_rank(), state.get_tensor_model_parallel_world_size()
        experts = state.get_expert_tensor_parallel_rank(), state.get_expert_tensor_parallel_world_size()
    for model in models:
        for local, parameter in model.named_parameters():
            name = global_name(model, local)
            rank, shards = experts if "local_experts" in name else dense
            std = deviation(name, parameter)
            if std is None:
                continue
            shape, split = list(parameter.shape), getattr(parameter, "partition_dim", -1) if shards > 1 else -1
            if split >= 0:
                shape[split] *= shards
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            drawn = torch.randn(shape, generator=generator, device=parameter.device) * std
            with torch.no_grad():
                parameter.copy_(drawn.chunk(shards, split)[rank] if split >= 0 else drawn)


def gather_weights(models: Sequence[torch.nn.Module], group: Any) -> dict[str, torch.Tensor] | None:
    """The weights of all chunks of a pipeline by global name, on the host of its first rank; None on the others. Every
    rank of ``group``, a pipeline without tensor parallelism, must call it."""
    own = {global_name(m, name): p.detach().cpu() for m in models for name, p in m.named_parameters()}
    ranks = dist.get_process_group_ranks(group)
    gathered: list[Any] | None = [None] * len(ranks) if dist.get_rank() == ranks[0] else None
    dist.gather_object(own, gathered, dst=ranks[0], group=group)
    return None if gathered is None else {name: weight for part in gathered for name, weight in part.items()}


def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a whole model the weights that :func:`gather_weights` brought together."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[global_name(model, name)])
