"""Qwen2.5-VL of mcore-bridge: Hugging Face's vision transformer before a GPT."""

from __future__ import annotations

from typing import Any

from mcore_bridge.model.mm_gpts.qwen import Qwen2_5VL_Vit

from .mcore_bridge import McoreBridgePage
from .qwen25_vision import WindowedVision


class Vision(WindowedVision):
    """Within mcore-bridge's wrapper."""

    called = "visual.visual"
    depth = "hf_config.vision_config.depth"

    def config(self, config: Any) -> Any:
        return config.hf_config.vision_config

    def token(self, config: Any, kind: str) -> int:
        found: int = getattr(config.hf_config, f"{kind}_token_id")
        return found


class McoreBridgeQwen25Vl(McoreBridgePage):
    """Images and videos of any size; text alone."""

    name = "qwen2-5-vl-mcore-bridge"
    visual_class = Qwen2_5VL_Vit
    encoders = (Vision(),)
