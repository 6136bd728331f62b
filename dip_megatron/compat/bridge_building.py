"""Megatron-Bridge's models, built without their language model; the names are those of :mod:`.bridge`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class NoLanguageModel(torch.nn.Module):
    """Where a model is built for its encoders alone."""

    share_embeddings_and_output_weights = False

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
