"""Megatron's norms under sequence parallelism, where Transformer Engine isn't there."""

from __future__ import annotations

import copy
from typing import Any


def allow_local_norms() -> None:
    """Let Megatron's local norm take a shard of a sequence, on which it computes the same.

    Its parameters are marked, so that Megatron sums their gradients over tensor-parallel ranks.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    local_norm = WrappedTorchNorm.__new__

    def on_a_shard(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        local = copy.copy(config)
        local.sequence_parallel = False
        norm = local_norm(cls, local, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = on_a_shard  # type: ignore[method-assign]
