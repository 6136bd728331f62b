"""Payload shapes by content, without the models: small picklable objects that planner workers use.

Nothing here imports torch or Megatron, so that a worker starts in a second.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...core import Payload, TensorSpec, Unit
from ...describe.workload import Microbatch

VISION, LANGUAGE, DIFFUSION = "vision", "language", "diffusion"


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


@dataclass(frozen=True)
class T2vShapes:
    """Payload shapes of text to video. Widths of the text encoder and of the DiT; ``compression`` and ``patch`` make
    clips' latent tokens of their frames and pixels. Every chunk of the DiT hands on the condition as it came."""

    text_hidden: int
    hidden: int
    compression: tuple[int, int, int]
    patch: tuple[int, int, int]
    dtype: str

    def payload(self, unit: Unit, load: Microbatch, *, leaves_module: bool) -> Payload:
        """Hidden states within the text encoder, then the condition; within the DiT hidden states, condition and
        timestep."""
        clips = load.clips[unit.first : unit.first + unit.count]
        words = sum(clip.text_tokens for clip in clips)
        condition = TensorSpec("condition", (words, 1, self.hidden), self.dtype, made_by=LANGUAGE)
        if unit.module == LANGUAGE:
            hidden = TensorSpec("hidden", (words, 1, self.text_hidden), self.dtype)
            return (condition,) if leaves_module else (hidden,)
        tokens = sum(clip.latent_tokens(self.compression, self.patch) for clip in clips)
        return (
            TensorSpec("hidden", (tokens, 1, self.hidden), self.dtype),
            condition,
            TensorSpec("timestep", (len(clips), self.hidden), self.dtype),
            TensorSpec("modulation", (len(clips), 6 * self.hidden), self.dtype),
        )
