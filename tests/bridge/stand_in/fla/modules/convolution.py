"""Megatron's ``deterministic_mode`` has torch's convolution in its place."""

from typing import Any


def causal_conv1d(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("the stand-in for flash-linear-attention is for deterministic_mode")
