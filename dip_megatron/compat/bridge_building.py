"""Megatron-Bridge's models, built without their language model, and what their encoders are asked."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .names import Name, Topic

_ROPE = "megatron.bridge.models.qwen_omni.modeling_qwen3_omni.rope"
KIMI_FEATURES = "_extract_image_features"
"""The method of Bridge's Kimi-K2.5 that calls its encoder and its projector."""
TOPIC = Topic(
    "parts of Megatron-Bridge's models",
    "megatron-bridge",
    "0.6.2",
    "Kimi-K2.5 and Qwen's omni models can't be trained under DIP",
    (
        Name("megatron.bridge.models.qwen_omni.modeling_qwen25_omni.thinker_model:Qwen3VLGPTModel"),
        Name("megatron.bridge.models.qwen_omni.modeling_qwen3_omni.thinker_model:Qwen3VLGPTModel"),
        Name(f"{_ROPE}:_get_feat_extract_output_lengths", ("input_lengths",)),
        Name(
            f"megatron.bridge.models.kimi_vl.modeling_kimi_k25_vl:KimiK25VLModel.{KIMI_FEATURES}",
            ("pixel_values", "grid_thws"),
        ),
    ),
)


class NoLanguageModel(torch.nn.Module):
    """Where a model is built for its encoders alone."""

    share_embeddings_and_output_weights = False
    vp_stage = None

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def shared_embedding_or_output_weight(self) -> None:
        """There is none."""


@contextmanager
def without_language_model(module: str) -> Iterator[None]:
    """Within, the models of Bridge's ``module`` that always build their language model build none."""
    loaded: Any = importlib.import_module(module)
    whole, loaded.Qwen3VLGPTModel = loaded.Qwen3VLGPTModel, NoLanguageModel
    try:
        yield
    finally:
        loaded.Qwen3VLGPTModel = whole


def kimi_features(model: Any, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """What that makes of pictures: embeddings ``[tokens, language hidden]`` of all of them."""
    return torch.cat(list(model._extract_image_features(pixels, grids)))


def sound_tokens(frames: torch.Tensor) -> torch.Tensor:
    """What clips of so many mel ``frames`` become in Qwen3-Omni, ``[clips]`` both."""
    rope: Any = importlib.import_module(_ROPE)
    counted: torch.Tensor = rope._get_feat_extract_output_lengths(frames)
    return counted
