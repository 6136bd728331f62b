"""Megatron's dumps of parameters and their gradients, by the names that the whole model has for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def by_whole_names(
    dump: Mapping[str, Mapping[str, Any]], chunks: Sequence[torch.nn.Module]
) -> dict[str, dict[str, Any]]:
    """What Megatron dumps of each of a rank's ``chunks`` (``model_chunk0`` and so on, each counting its own layers), as
    it dumps a model that is one chunk: layers are counted through the whole model, so that the dumps of all ranks
    together are those of a run on one rank."""
    found = {}
    for place, chunk in enumerate(chunks):
        layers = _layers(chunk)
        for name, value in dump.get(f"model_chunk{place}", {}).items():
            found[_renamed(name, layers)] = value
    return {"model_chunk0": found}


def _layers(chunk: torch.nn.Module) -> dict[str, str]:
    """By the name of each layer in a chunk, that in the whole model: layers know their number, from 1."""
    found = {}
    for name, module in chunk.named_modules():
        stack, _, place = name.rpartition(".")
        number = getattr(module, "layer_number", None)
        if place.isdigit() and isinstance(number, int):
            found[name] = f"{stack}.{number - 1}"
    return found


def _renamed(name: str, layers: Mapping[str, str]) -> str:
    parts = name.split(".")
    for end in range(1, len(parts)):
        layer = layers.get(".".join(parts[:end]))
        if layer is not None:
            return ".".join([layer, *parts[end:]])
    return name
