"""Qwen2-VL and Qwen2.5-VL of ROLL's ``mcore_adapter``: Hugging Face's vision transformers before a GPT."""

from __future__ import annotations

from mcore_adapter.models.model_factory import McaGPTModel
from mcore_adapter.models.qwen2_5_vl import Qwen2_5_VLModel
from mcore_adapter.models.qwen2_vl import Qwen2VLModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from .qwen25_vision import FullVision, WindowedVision
from .roll import RollSpec, RollVision


class Windowed(RollVision, WindowedVision):
    """Of Qwen2.5-VL."""

    config_class = Qwen2_5_VLVisionConfig
    first_matrix = ("mlp", "down_proj")


class Full(RollVision, FullVision):
    """Of Qwen2-VL."""

    config_class = Qwen2VLVisionConfig
    first_matrix = ("mlp", "fc1")


class RollQwen2Vl(RollSpec):
    """Images and videos of any size; text alone; several samples in a microbatch, a row each."""

    name = "qwen2-vl-roll"
    model_class = Qwen2VLModel
    language_class = McaGPTModel
    encoders = (Full(),)


class RollQwen25Vl(RollSpec):
    """Images and videos of any size; text alone; several samples in a microbatch, a row each."""

    name = "qwen2-5-vl-roll"
    model_class = Qwen2_5_VLModel
    language_class = McaGPTModel
    encoders = (Windowed(),)
