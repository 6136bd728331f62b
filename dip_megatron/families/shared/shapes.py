"""Payload shapes by content, without the models: small picklable objects that planner workers use.

Nothing here imports torch or Megatron, so that a worker starts in a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...core import Operation, Payload, TensorSpec, Unit
from ...describe.workload import Clip, Microbatch


def shard_lengths(lengths: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Rows of sequences of these lengths on each of so many context-parallel ranks, each of which has two equal pieces
    of every sequence: rounded up."""
    return tuple(lengths) if ranks == 1 else tuple(2 * -(-length // (2 * ranks)) for length in lengths)


VISION, LANGUAGE, DIFFUSION = "vision", "language", "diffusion"
T2vEnd = Literal["text", "condition", "diffusion"]
"""What a stage of text to video sends on: the LLM's hidden states, the projector's condition, the DiT's state."""
StageEnd = Literal["vision", "projected", "language"]
"""What a stage of a LLaVA sends on: the ViT's hidden states, what the projector makes of them, the LLM's."""


@dataclass(frozen=True)
class LlavaShapes:
    """Payload shapes of LLaVA: ``vision_tokens`` and ``image_tokens`` are per image before and after the projector.
    ``micro_batch_size``: samples of a microbatch that doesn't say otherwise. A unit's images are shared out over
    ``image_ranks``, which hand on as many each as the one with the most, until they are projected."""

    vision_tokens: int
    vision_hidden: int
    image_tokens: int
    language_hidden: int
    micro_batch_size: int
    sequence_parallel_size: int
    dtype: str
    context_parallel_size: int = 1
    image_ranks: int = 1

    def payload(self, unit: Unit, load: Microbatch, *, leaves_module: bool) -> Payload:
        """One tensor of hidden states, or of projected image embeddings."""
        end: StageEnd = "language"
        images = unit.count
        if unit.module == VISION:
            end = "projected" if leaves_module else "vision"
            images = images if leaves_module else -(-images // self.image_ranks)
        shape = self.hidden(end, images=images, tokens=sum(load.sequences), rows=load.rows)
        return (TensorSpec("hidden", shape, self.dtype),)

    def hidden(self, end: StageEnd, *, images: int, tokens: int, rows: int = 0) -> tuple[int, ...]:
        """Shape of what is sent on at such an end, for so many images, or so many positions of all samples, which are
        ``rows``."""
        if end == "vision":
            return (self.vision_tokens, images, self.vision_hidden)
        if end == "projected":
            return (self.image_tokens, images, self.language_hidden)
        samples = rows or self.micro_batch_size
        length = tokens // samples // self.sequence_parallel_size // self.context_parallel_size
        return (length, samples, self.language_hidden)


@dataclass(frozen=True)
class MixedLlavaShapes:
    """Payload shapes of a LLaVA in stages that mix modalities; ``ends[segment][rank]``: with what each stage ends."""

    shapes: LlavaShapes
    ends: tuple[tuple[StageEnd, ...], ...]

    def operation_payload(self, stage: Operation, unit: Unit, load: Microbatch) -> Payload:
        """What one stage sends on."""
        tokens = sum(load.sequences or (load.tokens,))
        end = self.ends[stage.segment][stage.rank]
        shape = self.shapes.hidden(end, images=len(load.images), tokens=tokens, rows=load.rows)
        return (TensorSpec("hidden", shape, self.shapes.dtype),)


@dataclass(frozen=True)
class GptShapes:
    """Payload shapes of a text-only GPT. ``micro_batch_size``: samples of a microbatch that doesn't say otherwise."""

    hidden: int
    micro_batch_size: int
    sequence_parallel_size: int
    dtype: str
    context_parallel_size: int = 1

    def payload(self, unit: Unit, load: Microbatch, *, leaves_module: bool) -> Payload:
        """One tensor of hidden states, ``[s, b, h]``."""
        samples = load.rows or self.micro_batch_size
        length = load.tokens // samples // self.sequence_parallel_size // self.context_parallel_size
        shape = (length, samples, self.hidden)
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
    context_parallel_size: int = 1

    def payload(self, unit: Unit, load: Microbatch, *, leaves_module: bool) -> Payload:
        """Hidden states within the text encoder, then the condition; within the DiT hidden states, condition and
        timestep."""
        clips = load.clips[unit.first : unit.first + unit.count]
        end: T2vEnd = "diffusion"
        if unit.module == LANGUAGE:
            end = "condition" if leaves_module else "text"
        return self.sent(end, clips, made_by=LANGUAGE)

    def sent(self, end: T2vEnd, clips: Sequence[Clip], made_by: str = "") -> Payload:
        """What is sent on at such an end, for these clips; ``made_by`` says who made the condition."""
        words = sum(clip.text_tokens for clip in clips)
        condition = TensorSpec("condition", (words, 1, self.hidden), self.dtype, made_by=made_by)
        if end == "text":
            return (TensorSpec("hidden", (words, 1, self.text_hidden), self.dtype),)
        if end == "condition":
            return (condition,)
        lengths = [clip.latent_tokens(self.compression, self.patch) for clip in clips]
        tokens = sum(shard_lengths(lengths, self.context_parallel_size))
        return (
            TensorSpec("hidden", (tokens, 1, self.hidden), self.dtype),
            condition,
            TensorSpec("timestep", (len(clips), self.hidden), self.dtype),
            TensorSpec("modulation", (len(clips), 6 * self.hidden), self.dtype),
        )


@dataclass(frozen=True)
class MixedT2vShapes:
    """Payload shapes of text to video in stages that mix modalities; ``ends[segment][rank]``: with what each ends."""

    shapes: T2vShapes
    ends: tuple[tuple[T2vEnd, ...], ...]

    def operation_payload(self, stage: Operation, unit: Unit, load: Microbatch) -> Payload:
        """What one stage sends on, for all clips of a microbatch."""
        return self.shapes.sent(self.ends[stage.segment][stage.rank], load.clips)
