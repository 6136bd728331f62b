"""Qwen2-VL and Qwen2.5-VL of mcore-bridge: Hugging Face's vision transformers before a GPT."""

from __future__ import annotations

from mcore_bridge.model.mm_gpts.qwen import Qwen2_5VL_Vit, Qwen2VL_Vit

from .mcore_bridge import McoreBridgeSpec, WrappedVision
from .qwen25_vision import FullVision, WindowedVision


class Vision(WrappedVision, WindowedVision):
    """As Megatron-Bridge's Qwen2.5-VL has it."""


class PlainVision(WrappedVision, FullVision):
    """Qwen2-VL's."""


class McoreBridgeQwen2Vl(McoreBridgeSpec):
    """Images and videos of any size; text alone."""

    name = "qwen2-vl-mcore-bridge"
    visual_class = Qwen2VL_Vit
    encoders = (PlainVision(),)


class McoreBridgeQwen25Vl(McoreBridgeSpec):
    """Images and videos of any size; text alone."""

    name = "qwen2-5-vl-mcore-bridge"
    visual_class = Qwen2_5VL_Vit
    encoders = (Vision(),)
