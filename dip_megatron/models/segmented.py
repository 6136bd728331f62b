"""What every program of a Megatron-Core model in segments has in common."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from ..runtime.modes import StageMode
from . import deferred_linear, layer_memory

Chunk = TypeVar("Chunk", bound=torch.nn.Module)


class SegmentedProgram:
    """One rank's share of a model: ``layers[module][segment][rank]``, and what its chunks follow while they run."""

    def __init__(self, layers: Mapping[str, tuple[tuple[int, ...], ...]], rank: int):
        self.layers = dict(layers)
        self.rank = rank
        self.ranks = len(next(iter(self.layers.values()))[0])
        self.mode = StageMode()
        self._supports_split = False

    @property
    def supports_split(self) -> bool:
        """Whether W can compute the weight gradients of this rank's chunks, once they are built."""
        return self._supports_split

    def _check_layers(self, module: str, count: int) -> None:
        """Raises ValueError unless the partition gives ``module`` its ``count`` layers, on all ranks' chunks."""
        total = sum(sum(line) for line in self.layers[module])
        if total != count:
            raise ValueError(f"partition gives {module} {total} layers, the model has {count}")
        if any(len(line) != self.ranks for line in self.layers[module]):
            raise ValueError(f"partition of {module} must list {self.ranks} ranks per segment")

    def _finish(self, chunks: list[Chunk], config: Any) -> list[torch.nn.Module]:
        """Let the rank's chunks, in their order, follow the mode and stand where Megatron's wrappers look.

        ``config`` is that of the module with the loss.
        """
        for index, chunk in enumerate(chunks):
            # Megatron's wrappers look at the chunk's place among all of them, its inner model at its segment.
            own: Any = copy.copy(config)
            own.virtual_pipeline_model_parallel_size = len(chunks)
            own.pipeline_model_parallel_layout = None
            chunk.config, chunk.vp_stage = own, index  # type: ignore[assignment]
            deferred_linear.install(chunk, self.mode)
            layer_memory.install(chunk, self.mode)
        self._supports_split = not any(deferred_linear.undeferrable(chunk) for chunk in chunks)
        return list(chunks)


def unwrapped(chunk: torch.nn.Module, kind: type[Chunk]) -> Chunk:
    """The model of class ``kind`` inside Megatron's wrappers."""
    while not isinstance(chunk, kind):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def dtype_name(config: Any) -> str:
    """The dtype of what travels between stages, as payloads name it."""
    return str(config.pipeline_dtype or config.params_dtype).removeprefix("torch.")
