"""Qwen3-VL of ROLL's ``mcore_adapter``, dense and with experts: Hugging Face's vision transformer, of which some layers
also feed the language model's first layers (deepstack), before a GPT with a transformer block of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from mcore_adapter.models.qwen3_vl import Qwen3VLModel
from mcore_adapter.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLGPTModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from ..shared.packing import packed_lengths
from .deepstack import HuggingFaceVision, add_to_layer
from .grids import GivenRows
from .model_spec import Arguments
from .roll import RollSpec, RollVision, packed_places


class _Given(GivenRows):
    def answer(self, rows: torch.Tensor) -> Any:
        """Embeddings; what deepstack adds comes to each layer by itself."""
        return SimpleNamespace(pooler_output=rows, deepstack_features=[])


class Deepstack(RollVision, HuggingFaceVision):
    """Of Qwen3-VL, dense and with experts: two equal classes."""

    config_class = Qwen3VLVisionConfig
    first_matrix = ("mlp", "linear_fc1")
    packs = True

    def stands_in(self, rows: torch.Tensor, merged: int, **known: Any) -> GivenRows:
        return _Given(rows, merged, **known)


class RollQwen3Vl(RollSpec):
    """Images and videos of any size; text alone; several samples in a microbatch, a row each or packed by the class
    itself. The class wants all layers that deepstack feeds on its first stage; here they may be on any rank's."""

    name = "qwen3-vl-roll"
    model_class = Qwen3VLModel
    language_class = Qwen3VLGPTModel
    encoders = (Deepstack(),)
    usual_picture = 300
    """Patches of 16 x 16, four a token."""

    def chunk(self, kwargs: Mapping[str, Any], config: Any, *, first: bool, last: bool, segment: int) -> Any:
        model = super().chunk(kwargs, config, first=first, last=last, segment=segment)
        if first:
            model.merge_deepstack_embeds = _nothing_to_add
        return model

    def check_call(self, arguments: Arguments) -> None:
        if self.packed(arguments) is not None and arguments.get("attention_mask") is None:
            raise ValueError(
                "the loop's forward_step gives packed_seq_params without an attention_mask, by which the class finds "
                "the samples that it packs; give it, or use schedule off"
            )

    def laid(self, arguments: Arguments) -> tuple[int, tuple[int, ...]]:
        """Samples come in a row each, and the class packs them."""
        packed = self.packed(arguments)
        if packed is None:
            return super().laid(arguments)
        return 1, packed_lengths(packed, int(packed.cu_seqlens_q_padded[-1]))

    def places(self, config: Any, arguments: Arguments) -> torch.Tensor:
        found, packed = super().places(config, arguments), self.packed(arguments)
        return found if packed is None else packed_places(found, arguments["attention_mask"], packed)

    def add_tap(
        self, model: Any, hidden: torch.Tensor, where: torch.Tensor, tap: torch.Tensor, row: Sequence[int]
    ) -> torch.Tensor:  # fmt: skip
        return add_to_layer(model, hidden, where, tap, row)


def _nothing_to_add(*_: Any) -> tuple[None, None]:
    """Instead of what the class takes to its first stage's layers."""
    return None, None
