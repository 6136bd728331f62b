"""What the layers of a rank are told about the stage they run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from ..core.strategies import parse_strategy
from .deferred import WeightGradients
from .offload import OffloadedActivations


@lru_cache(maxsize=4096)
def layer_strategies(text: str, layers: int) -> tuple[str, ...]:
    """One memory strategy per layer of a chunk; empty if all keep everything. Raises StrategyError."""
    return () if text == "none" else parse_strategy(text, layers)


class LayerContext:
    """Read by the layers of all chunks of a rank while a stage runs. A rank runs one stage at a time, so there is one.

    ``weight_gradients``: where weight gradients are left, None to compute them at once. ``strategies``: the memory
    strategy of each layer of the chunk, empty for none. ``offloaded``: where layers whose strategy offloads leave
    their activations.
    """

    __slots__ = ("_stream", "offloaded", "strategies", "weight_gradients")

    def __init__(self) -> None:
        self._stream: Any = None
        self.weight_gradients: WeightGradients | None = None
        self.strategies: tuple[str, ...] = ()
        self.offloaded: OffloadedActivations | None = None

    @contextmanager
    def stage(
        self,
        weight_gradients: WeightGradients | None,
        strategies: tuple[str, ...] = (),
        offloaded: OffloadedActivations | None = None,
    ) -> Iterator[None]:
        """Within, layers run as one stage is to be run. In a backward they get no strategies: what is recomputed there
        is not to be dropped again."""
        self.weight_gradients, self.strategies, self.offloaded = weight_gradients, strategies, offloaded
        try:
            yield
        finally:
            self.weight_gradients, self.strategies, self.offloaded = None, (), None

    def offload(self) -> OffloadedActivations:
        """A place for one stage's offloaded layers. All stages share one side stream, if there is a GPU."""
        if self._stream is None and torch.cuda.is_available():
            # None of the usual ones, which all groups of NCCL's take in turn: copies that a stage waits for would
            # stand behind a reduction that waits for other replicas.
            self._stream = torch.cuda.Stream(priority=-1)
        return OffloadedActivations(self._stream)
