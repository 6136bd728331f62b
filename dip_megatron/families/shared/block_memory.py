"""Memory strategies of Hugging Face's transformer blocks, chosen anew for every stage, as :mod:`.layer_memory` has them
for Megatron-Core's layers.

A block has no switches inside its attention and its MLP, so that what a strategy drops is dropped with all of the half
it is in: ``selective`` recomputes the attention, ``mlp`` and ``activation`` the MLP; ``offload_and_activation``
offloads all. That holds no more than planned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ...runtime.layer_context import LayerContext
from .layer_memory import offloaded

_HALVES = {"selective": 0, "mlp": 1, "activation": 1}


def install(blocks: Sequence[torch.nn.Module], mode: LayerContext, halves: tuple[str, str] = ("attn", "mlp")) -> None:
    """Let a chunk's blocks, in their order, follow ``mode.strategies``; ``halves`` names a block's attention and its
    MLP; of one that is no module of its own ("") all of the block is recomputed."""
    for index, block in enumerate(blocks):
        block.forward = _switched(block, index, mode, halves)


def _switched(
    block: torch.nn.Module, index: int, mode: LayerContext, halves: tuple[str, str]
) -> Callable[..., Any]:  # fmt: skip
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not mode.strategies or not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        strategy = mode.strategies[index]
        if strategy == "none":
            return plain(*args, **kwargs)
        if strategy.startswith("offload"):
            return offloaded(block, index, mode, plain, args, kwargs)
        name = "" if strategy == "full" else halves[_HALVES[strategy]]
        if not name:
            return checkpoint(plain, *args, use_reentrant=False, **kwargs)
        half = getattr(block, name)
        half.forward = partial(checkpoint, half.forward, use_reentrant=False)
        try:
            return plain(*args, **kwargs)
        finally:
            del half.forward

    return forward
