"""Payload shapes by content, without the models: small picklable objects that planner workers use.

Nothing here imports torch or Megatron, so that a worker starts in a second.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..schedule import Payload, TensorSpec, Unit
from ..workload import Microbatch

VISION, LANGUAGE = "vision", "language"


@dataclass(frozen=True)
class LlavaShapes:
    """Payload shapes of LLaVA: ``vision_tokens`` and ``image_tokens`` are per image before and after the projector."""

    vision_tokens: int
    vision_hidden: int
    image_tokens: int
    language_hidden: int
    micro_batch_size: int
    sequence_parallel_size: int
    dtype: str

    def payload(self, unit: Unit, load: Microbatch, *, leaves_module: bool) -> Payload:
        """One tensor of hidden states, or of projected image embeddings."""
        if unit.module == VISION and leaves_module:
            shape = (self.image_tokens, unit.count, self.language_hidden)
        elif unit.module == VISION:
            shape = (self.vision_tokens, unit.count, self.vision_hidden)
        else:
            shape = (
                sum(load.sequences) // self.micro_batch_size // self.sequence_parallel_size,
                self.micro_batch_size,
                self.language_hidden,
            )
        return (TensorSpec("hidden", shape, self.dtype),)


@dataclass(frozen=True)
class GptShapes:
    """Payload shapes of a text-only GPT."""

    hidden: int
    micro_batch_size: int
    sequence_parallel_size: int
    dtype: str

    def payload(self, unit: Unit, load: Microbatch, *, leaves_module: bool) -> Payload:
        """One tensor of hidden states, ``[s, b, h]``."""
        shape = (max(load.sequences) // self.sequence_parallel_size, self.micro_batch_size, self.hidden)
        return (TensorSpec("hidden", shape, self.dtype),)
