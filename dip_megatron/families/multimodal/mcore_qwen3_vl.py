"""Qwen3-VL of mcore-bridge, dense and with experts: Hugging Face's vision transformer, of which some layers also feed
the language model's first layers (deepstack), before a GPT."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from mcore_bridge.model.mm_gpts.qwen3_vl import Qwen3VL_Vit

from .deepstack import HuggingFaceVision, add_to_layer
from .grids import PIXELS, VIDEOS, GivenRows
from .mcore_bridge import McoreBridgeSpec, WrappedVision
from .model_spec import Arguments


class _Given(GivenRows):
    def answer(self, rows: torch.Tensor) -> Any:
        """Embeddings; what deepstack adds comes to each layer by itself."""
        return SimpleNamespace(pooler_output=rows, deepstack_features=[])


class Vision(WrappedVision, HuggingFaceVision):
    """Of Qwen3-VL, dense and with experts: two equal classes."""

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        return _Given(embeddings, self.merged(config))


class McoreBridgeQwen3Vl(McoreBridgeSpec):
    """Images and videos of any size; text alone. mcore-bridge wants all layers that deepstack feeds on its first stage;
    here they may be on any rank's."""

    name = "qwen3-vl-mcore-bridge"
    visual_class = Qwen3VL_Vit
    encoders = (Vision(),)
    usual_picture = 300
    """Patches of 16 x 16, four a token."""

    def check_call(self, arguments: Arguments) -> None:
        """mcore-bridge counts what deepstack adds row by row, and the places in the language model position by
        position."""
        rows = arguments["input_ids"].shape[0]
        if rows > 1 and any(arguments.get(name) is not None for name in (PIXELS, VIDEOS)):
            raise ValueError(
                f"mcore-bridge adds Qwen3-VL's deepstack features to the wrong samples where a microbatch has {rows} "
                "rows; pack them into one (padding_free), or use micro_batch_size 1"
            )

    def add_tap(
        self, model: Any, hidden: torch.Tensor, where: torch.Tensor, tap: torch.Tensor, row: Sequence[int]
    ) -> torch.Tensor:  # fmt: skip
        return add_to_layer(model.language_model, hidden, where, tap, row)
