"""Payload shapes of Qwen2.5-VL, without the model."""

from __future__ import annotations

from dataclasses import dataclass

from ...core import Payload, TensorSpec, Unit
from ...describe.workload import Microbatch
from ..shared.shapes import VISION


@dataclass(frozen=True)
class QwenVlShapes:
    """``merged`` patches are one token of the language model, and travel as one row within the encoder, too."""

    merged: int
    vision_hidden: int
    language_hidden: int
    micro_batch_size: int
    sequence_parallel_size: int
    dtype: str

    def payload(self, unit: Unit, load: Microbatch, *, leaves_module: bool) -> Payload:
        """One tensor: hidden states of patches ``[tokens, merged * vision_hidden]``, embeddings of images ``[tokens,
        language_hidden]``, or hidden states of the language model ``[s, b, language_hidden]``."""
        shape: tuple[int, ...]
        if unit.module == VISION:
            tokens = sum(load.images[unit.first : unit.first + unit.count])
            shape = (tokens, self.language_hidden if leaves_module else self.merged * self.vision_hidden)
        else:
            length = load.tokens // self.micro_batch_size // self.sequence_parallel_size
            shape = (length, self.micro_batch_size, self.language_hidden)
        return (TensorSpec("hidden", shape, self.dtype),)
