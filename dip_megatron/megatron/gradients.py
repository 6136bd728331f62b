"""Data-parallel gradient reduction under a plan.

Megatron starts a chunk's reduction from backward hooks of its last microbatch. Replicas run different plans, so the
last backward of each chunk would come in a different order on each, and collectives of one group would not match.
Here hooks only accumulate, and the reductions start in one order on all replicas: each as soon as its chunk, and every
chunk before it in that order, has ended its last backward.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ..compat.buckets import start_gradient_reduction


class GradientSynchronization:
    """Holds back gradient reductions of one iteration and starts them in order.

    ``order`` lists chunk indices as backwards naturally end: the last module's last segment first. ``at_the_end``: none
    starts before all of them have ended. Replicas that share experts exchange tokens during backwards, and would come
    to those exchanges and to reductions in orders of their own, which devices with one queue for both can't follow.
    """

    def __init__(self, chunks: list[torch.nn.Module], config: Any, order: list[int], at_the_end: bool = False):
        self._chunks = chunks
        self._order = order
        self._at_the_end = at_the_end
        self._done: set[int] = set()
        self._started = 0
        self._contexts = contextlib.ExitStack()
        # Set by Megatron's train loop, when gradient reduction overlaps with backward.
        self._overlaps = config.no_sync_func is not None

    def begin(self, idle: set[int]) -> None:
        """``idle`` chunks have no backward in this iteration (a batch without images)."""
        if self._overlaps:
            for chunk in self._chunks:
                if hasattr(chunk, "no_sync"):
                    self._contexts.enter_context(chunk.no_sync())
        for index in sorted(idle):
            self.chunk_done(index)

    def chunk_done(self, index: int) -> None:
        """The chunk's last weight gradient of the iteration is accumulated."""
        self._done.add(index)
        if self._at_the_end and len(self._done) < len(self._chunks):
            return
        while self._overlaps and self._started < len(self._order) and self._order[self._started] in self._done:
            start_gradient_reduction(self._chunks[self._order[self._started]])
            self._started += 1

    def end(self) -> None:
        """Leave Megatron's no_sync; every reduction has been started."""
        missing = set(range(len(self._chunks))) - self._done
        if missing:
            raise RuntimeError(f"chunks {sorted(missing)} have not ended their backward")
        self._contexts.close()
