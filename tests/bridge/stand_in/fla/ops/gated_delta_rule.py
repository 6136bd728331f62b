"""Megatron's ``deterministic_mode`` has a rule of its own in its place."""

from typing import Any


def chunk_gated_delta_rule(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("the stand-in for flash-linear-attention is for deterministic_mode")
