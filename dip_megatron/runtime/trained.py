"""Finds out which parts of a rank's chunks train, from their parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ..describe.model.training import ChunkTraining, PartTraining, Report

_LAYER = re.compile(r"(?<!mtp)(^|\.)(layers|blocks)\.\d+\.")  # Layers of multi-token prediction belong to the head.
_WRAPPERS = re.compile(r"^(module\.)+")

Names = frozenset[str]


class TrainedParameters:
    """Watches which parameters of a rank's chunks require a gradient, which scripts may change between iterations."""

    def __init__(self) -> None:
        self._flags: tuple[tuple[bool, ...], ...] = ()

    def changed(self, chunks: Sequence[torch.nn.Module]) -> bool:
        """Whether other parameters train than at the last call; true at the first call. Looks at every parameter."""
        flags = tuple(tuple(p.requires_grad for p in chunk.parameters()) for chunk in chunks)
        before, self._flags = self._flags, flags
        return flags != before


def report(chunks: Sequence[torch.nn.Module], begins: Sequence[bool], built: Sequence[Names] | None = None) -> Report:
    """Report what trains of each chunk.

    Parameters outside of layers (named ``layers.N.``, or ``blocks.N.`` in Hugging Face models) belong to the stem if
    the chunk is the first of its module and they are before its layers, else to the head.

    Args:
        chunks: The rank's chunks.
        begins: For each chunk, whether it is the first of its module.
        built: For each chunk, the names of the parameters that it was built with. Parameters that a loop added later,
            such as adapters, train although the model's description says that the part is frozen. None if none were
            added.
    """
    known = built or [names_in(chunk) for chunk in chunks]
    return tuple(_chunk(chunk, first, names) for chunk, first, names in zip(chunks, begins, known, strict=True))


def names_in(chunk: torch.nn.Module) -> Names:
    """Return the names of a chunk's parameters without the prefixes of Megatron's wrappers."""
    return frozenset(within(name) for name, _ in chunk.named_parameters())


def within(name: str) -> str:
    """Return a parameter's name without the prefixes of Megatron's wrappers."""
    return _WRAPPERS.sub("", name)


def _chunk(chunk: torch.nn.Module, first: bool, built: Names) -> ChunkTraining:
    parts: dict[str, list[tuple[str, torch.nn.Parameter]]] = {"stem": [], "layers": [], "head": []}
    for name, parameter in chunk.named_parameters():
        if _LAYER.search(name):
            parts["layers"].append((name, parameter))
        else:
            parts["stem" if first and not parts["layers"] else "head"].append((name, parameter))
    return ChunkTraining(**{part: _part(found, built) for part, found in parts.items()})


def _part(parameters: list[tuple[str, torch.nn.Parameter]], built: Names) -> PartTraining:
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    matrix = next((name for name, p in trained if p.dim() > 1 and within(name) in built), "")
    return PartTraining(sum(p.numel() for _, p in trained), sum(p.numel() for _, p in parameters), matrix)
