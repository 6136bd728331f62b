"""What trains of this rank's chunks, read off their parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ..describe.model.training import ChunkTraining, PartTraining, Report

_LAYER = re.compile(r"(?<!mtp)(^|\.)(layers|blocks)\.\d+\.")  # those of multi-token prediction go with the head
_WRAPPERS = re.compile(r"^(module\.)+")

Names = frozenset[str]


class TrainedParameters:
    """Watches which parameters of a rank's chunks require a gradient. Scripts may change that between iterations."""

    def __init__(self) -> None:
        self._flags: tuple[tuple[bool, ...], ...] = ()

    def changed(self, chunks: Sequence[torch.nn.Module]) -> bool:
        """Whether they are others than at the last call; true at the first. Looks at every parameter, each time."""
        flags = tuple(tuple(p.requires_grad for p in chunk.parameters()) for chunk in chunks)
        before, self._flags = self._flags, flags
        return flags != before


def report(chunks: Sequence[torch.nn.Module], begins: Sequence[bool], built: Sequence[Names] | None = None) -> Report:
    """What trains of each chunk; ``begins[i]``: the chunk is its module's first, so that what it has outside of its
    layers (``layers.N.`` in a parameter's name, ``blocks.N.`` in Hugging Face's) is the stem if it stands before them.
    Else it is the head. ``built[i]`` are the names of what it was built with (None: of all): a loop that puts adapters
    into a part has said that they train, whatever the model's description says of the part."""
    known = built or [names_in(chunk) for chunk in chunks]
    return tuple(_chunk(chunk, first, names) for chunk, first, names in zip(chunks, begins, known, strict=True))


def names_in(chunk: torch.nn.Module) -> Names:
    """Of a chunk's parameters, within Megatron's wrappers."""
    return frozenset(within(name) for name, _ in chunk.named_parameters())


def within(name: str) -> str:
    """A parameter's name within Megatron's wrappers."""
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
