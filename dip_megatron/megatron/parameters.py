"""Data-parallel parameter gathers (``--overlap-param-gather``) under a plan.

Megatron starts the gather of a bucket from the forward hook of the first layer that needs it. Replicas run different
plans, so these would come in a different order on each, and collectives of one group would not match. Here all of them
start at the beginning of the iteration, in one order on all replicas; hooks only wait.
"""

from __future__ import annotations

from typing import Any

import torch

from ..compat.buckets import finish_gather, start_gather, to_gather


class ParameterSynchronization:
    """Starts the gathers of one iteration and waits for those that no stage has waited for."""

    def __init__(self, chunks: list[torch.nn.Module]):
        self._buckets: list[Any] = [bucket for chunk in chunks for bucket in to_gather(chunk)]

    def begin(self) -> None:
        """Start all gathers, in the order in which forwards naturally come to need them."""
        for bucket in self._buckets:
            start_gather(bucket)

    def end(self) -> None:
        """Before the optimizer writes: chunks without a stage in this iteration have waited for nothing."""
        for bucket in self._buckets:
            finish_gather(bucket)
