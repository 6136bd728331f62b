"""Qwen2.5-VL of Megatron-Bridge: Hugging Face's vision transformer with attention in windows, before a GPT."""

from __future__ import annotations

from megatron.bridge.models.qwen_vl.modeling_qwen25_vl import Qwen25VLModel

from .model_spec import ProviderSpec
from .qwen25_vision import WindowedVision


class Qwen25Vl(ProviderSpec):
    """Images and videos of any size; text alone."""

    name = "qwen2-5-vl"
    model_class = Qwen25VLModel
    encoders = (WindowedVision(),)
