"""Data-parallel parameter gathers (``--overlap-param-gather``) under a plan.

Megatron starts the gather of a bucket from the forward hook of the first layer that needs it. Replicas run different
plans, so these would come in a different order on each, and collectives of one group would not match. Here all of them
start at the beginning of the iteration, in one order on all replicas; hooks only wait.
"""

from __future__ import annotations

from typing import Any

import torch


class ParameterSynchronization:
    """Starts the gathers of one iteration and waits for those that no stage has waited for."""

    def __init__(self, chunks: list[torch.nn.Module]):
        # Megatron takes the hooks away for an iteration whose parameters are known to be whole. Within a chunk the last
        # bucket holds the first layers.
        self._buckets: list[Any] = [
            bucket
            for chunk in chunks
            if getattr(chunk, "remove_forward_pre_hook_handles", None)
            for bucket in reversed([*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups])  # type: ignore[misc]
        ]

    def begin(self) -> None:
        """Start all gathers, in the order in which forwards naturally come to need them."""
        for bucket in self._buckets:
            bucket.next_param_gather_bucket_group = None  # nothing is left for hooks to start
            if not bucket.param_gather_dispatched:
                bucket.start_param_sync()

    def end(self) -> None:
        """Before the optimizer writes: chunks without a stage in this iteration have waited for nothing."""
        for bucket in self._buckets:
            if bucket.param_gather_handle is not None:
                bucket.finish_param_sync(skip_next_bucket_dispatch=True)
