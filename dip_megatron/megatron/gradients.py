"""Data-parallel gradient reduction under a plan.

Megatron starts a chunk's reduction from backward hooks of its last microbatch. Replicas run different plans, so the
last backward of each chunk would come in a different order on each, and collectives of one group would not match.
Here hooks only accumulate, and the reductions start in one order on all replicas: each as soon as its chunk, and every
chunk before it in that order, has ended its last backward; of replicas that exchange tokens during backwards, at the
places that their plans have for them.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal
from weakref import WeakSet

import torch

from ..compat.buckets import start_gradient_reduction
from ..core import Plan
from ..core.reductions import starts_reductions

ReductionStart = Literal["when done", "by plan", "at the end"]
"""When a chunk's reduction starts: once it and all before it in the order have ended their backwards; where the plan
says; once all chunks have."""


def reduction_start(plan: Plan, chunks: list[torch.nn.Module], reduced: WeakSet[torch.nn.Module]) -> ReductionStart:
    """When reductions of an iteration under ``plan`` start; ``reduced`` are the chunks whose gradients have been
    reduced before. NCCL connects replicas with their first reduction, where each host waits for all others and gives
    its device nothing meanwhile: in the first iteration on GPUs a rank comes there only when no other rank of its
    replica waits for a stage of it any more."""
    if starts_reductions(plan):
        return "by plan"
    connected = not torch.cuda.is_available() or all(chunk in reduced for chunk in chunks)
    return "when done" if connected and plan.coupled is None else "at the end"


class GradientSynchronization:
    """Holds back gradient reductions of one iteration and starts them in order.

    ``order`` lists chunk indices as backwards naturally end: the last module's last segment first. Replicas that share
    experts exchange tokens during backwards, and would come to those exchanges and to reductions in orders of their
    own, which devices with one queue for both can't follow: their plans say where reductions start
    (:mod:`..core.reductions`), or, in plans that don't, after all backwards.
    """

    def __init__(
        self, plan: Plan, chunks: list[torch.nn.Module], config: Any, order: list[int],
        reduced: WeakSet[torch.nn.Module],
    ):  # fmt: skip
        """``reduced``, see :func:`reduction_start`, holds these chunks, too, once the iteration has ended."""
        self._chunks = chunks
        self._order = order
        self._start = reduction_start(plan, chunks, reduced)
        self._reduced = reduced
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
        if self._start == "by plan" or (self._start == "at the end" and len(self._done) < len(self._chunks)):
            return
        while self._started < len(self._order) and self._order[self._started] in self._done:
            self._start_next()

    def reduce(self, index: int) -> None:
        """The plan starts the chunk's reduction here."""
        if index not in self._done or self._order[self._started] != index:
            raise RuntimeError(
                f"the plan reduces chunk {index} where it has gradients to come, or chunks {self._order[: index + 1]} "
                "are not reduced before"
            )
        self._start_next()

    def _start_next(self) -> None:
        if self._overlaps:
            start_gradient_reduction(self._chunks[self._order[self._started]])
        self._started += 1

    def end(self) -> None:
        """Leave Megatron's no_sync; every reduction has been started."""
        missing = set(range(len(self._chunks))) - self._done
        if missing:
            raise RuntimeError(f"chunks {sorted(missing)} have not ended their backward")
        if self._started < len(self._order):
            raise RuntimeError(f"the plan leaves out the reduction of chunks {self._order[self._started :]}")
        self._reduced.update(self._chunks)
        self._contexts.close()
