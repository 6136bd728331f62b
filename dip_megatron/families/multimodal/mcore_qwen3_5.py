"""Qwen3.5 of mcore-bridge, dense and with experts: Hugging Face's vision transformer before gated delta nets, with full
attention among them."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from mcore_bridge.model.mm_gpts.qwen3_5 import Qwen3_5Vit

from .deepstack import HuggingFaceVision
from .mcore_bridge import McoreBridgeSpec, WrappedVision


class Vision(WrappedVision, HuggingFaceVision):
    """Qwen3-VL's without deepstack."""

    def tapped(self, config: Any) -> tuple[int, ...]:
        return ()


class McoreBridgeQwen35(McoreBridgeSpec):
    """Images and videos of any size; text alone."""

    name = "qwen3-5-mcore-bridge"
    visual_class = Qwen3_5Vit
    encoders = (Vision(),)
    predicts = True
    usual_picture = 300
    """Patches of 16 x 16, four a token."""

    def shown(self) -> Mapping[str, Any]:
        """mcore-bridge's builder goes through the layers afterwards, to set norms of gated delta nets; it does so for
        each chunk."""
        return {"language_model": SimpleNamespace(decoder=SimpleNamespace(layers=()))}
