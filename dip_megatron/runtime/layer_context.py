"""What the layers of a rank can read about the operation that is running."""

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
    """Return one memory strategy per layer of a chunk; empty if all layers keep everything. Raises StrategyError."""
    return () if text == "none" else parse_strategy(text, layers)


class LayerContext:
    """Settings that the layers of all chunks of a rank read while an operation runs. A rank runs one operation at a
    time, so one context serves all chunks.

    Attributes:
        weight_gradients: Store for deferred weight gradients; None to compute them at once.
        strategies: Memory strategy of each layer of the chunk; empty if all layers keep everything.
        offloaded: Store for the activations of layers whose strategy offloads.
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
        """Set the context for one operation. A backward passes no strategies, because what it recomputes must not be
        dropped again."""
        self.weight_gradients, self.strategies, self.offloaded = weight_gradients, strategies, offloaded
        try:
            yield
        finally:
            self.weight_gradients, self.strategies, self.offloaded = None, (), None

    def offload(self) -> OffloadedActivations:
        """Create the store for the offloaded activations of one forward. All stores share one side stream on a GPU."""
        if self._stream is None and torch.cuda.is_available():
            # A high-priority stream, not one of the default pool that NCCL's groups also use: copies that an operation
            # waits for could otherwise queue behind a reduction that waits for other replicas.
            self._stream = torch.cuda.Stream(priority=-1)
        return OffloadedActivations(self._stream)
