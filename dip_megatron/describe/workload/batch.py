"""What a batch holds: microbatches of text, of instances that encoders read, and of video clips, as counts only.

Instances are of a *kind*: ``images``, ``audios``, or whatever name a module of the model has as its input (``points``
of a lidar, say). Only counts matter here, so that a kind needs no code of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..model import ModuleShape, MultimodalModel


class WorkloadError(ValueError):
    """A batch that can't be trained on, or a malformed workload file (then ``FILE:LINE: field: reason``)."""


@dataclass(frozen=True)
class Clip:
    """One video clip with its prompt: text tokens, frames, and pixels."""

    text_tokens: int
    frames: int
    height: int
    width: int

    def latent_tokens(self, compression: tuple[int, int, int], patch: tuple[int, int, int]) -> int:
        """Tokens of the clip in a DiT: each dimension divided by compression times patch, rounded up."""
        tokens = 1
        for size, squeeze, group in zip((self.frames, self.height, self.width), compression, patch, strict=True):
            tokens *= -(-size // (squeeze * group))
        return tokens


_OWN_FIELDS = ("text_tokens", "images", "audios", "clips", "sequences", "text")


@dataclass(frozen=True)
class Microbatch:
    """Counts of one microbatch. ``images`` and ``audios`` hold one entry an instance: its tokens as the language model
    sees them. ``others`` are the same of further kinds, by name (a mapping, kept as pairs). ``sequences`` are the
    lengths (text and all) of the samples packed into it, each attending to itself only; empty: one sequence of
    everything. ``rows`` are the samples of its batch axis where they aren't as many as in every microbatch; 0: they
    are."""

    text_tokens: int = 0
    images: tuple[int, ...] = ()
    audios: tuple[int, ...] = ()
    clips: tuple[Clip, ...] = ()
    sequences: tuple[int, ...] = ()
    others: Mapping[str, tuple[int, ...]] | tuple[tuple[str, tuple[int, ...]], ...] = ()
    rows: int = 0

    def __post_init__(self) -> None:
        others = self.others.items() if isinstance(self.others, Mapping) else self.others
        object.__setattr__(self, "others", tuple(sorted((kind, tuple(tokens)) for kind, tokens in others if tokens)))
        fault = self.fault()
        if fault is not None:
            raise WorkloadError(fault)

    def fault(self) -> str | None:
        """``field: reason`` of the first contradiction, or None."""
        if self.text_tokens < 0:
            return f"text_tokens: {self.text_tokens} is negative"
        if self.rows < 0 or (self.rows and self.tokens % self.rows):
            return f"rows: {self.tokens} tokens don't make {self.rows} rows of one length"
        for name in dict(self.others):
            if name in _OWN_FIELDS:
                return f"others.{name}: stands beside others, not in it"
        lists = {"images": self.images, "audios": self.audios, "sequences": self.sequences}
        for name, line in (lists | {f"others.{kind}": line for kind, line in dict(self.others).items()}).items():
            for i, tokens in enumerate(line):
                if tokens < 1:
                    return f"{name}[{i}]: needs at least 1 token, got {tokens}"
        for i, clip in enumerate(self.clips):
            if min(clip.frames, clip.height, clip.width) < 1 or clip.text_tokens < 0:
                return f"clips[{i}]: needs frames, height and width of at least 1 and text_tokens of at least 0"
        if self.clips and (self.text_tokens or any(self.encoded.values()) or self.sequences):
            return "clips: a microbatch of clips has no text_tokens, images, audios or sequences of its own"
        if self.tokens == 0 and not self.clips:
            return "text_tokens: the microbatch is empty"
        if self.sequences and sum(self.sequences) != self.tokens:
            return f"sequences: add up to {sum(self.sequences)}, the microbatch has {self.tokens} tokens"
        return None

    @cached_property
    def encoded(self) -> dict[str, tuple[int, ...]]:
        """By kind, the tokens of each instance that an encoder reads, as the language model sees them."""
        return {"images": self.images, "audios": self.audios, **dict(self.others)}

    @cached_property
    def tokens(self) -> int:
        """Tokens that a language model sees: text and what encoders give it, or the prompts of the clips."""
        return self.text_tokens + sum(map(sum, self.encoded.values())) + sum(c.text_tokens for c in self.clips)

    def instances(self, module: ModuleShape) -> int:
        """How many instances (of its kind, clips, one for packed text) ``module`` processes of this microbatch."""
        if module.encodes:
            return len(self.encoded.get(module.input, ()))
        if module.input == "clips" or self.clips:
            return len(self.clips)
        return 1


@dataclass(frozen=True)
class GlobalBatch:
    """The microbatches that one data-parallel replica trains on in one iteration."""

    microbatches: tuple[Microbatch, ...]

    def __post_init__(self) -> None:
        if not self.microbatches:
            raise WorkloadError("microbatches: an iteration needs at least one")

    def check(self, model: MultimodalModel) -> None:
        """Raises WorkloadError if ``model`` has no module for something in the batch, or a microbatch does nothing."""
        inputs = {m.input for m in model.modules}
        for i, microbatch in enumerate(self.microbatches):
            for name, held in {**microbatch.encoded, "clips": microbatch.clips}.items():
                if held and name not in inputs:
                    raise WorkloadError(f"microbatches[{i}].{name}: no module of {model.name} reads {name}")
            if "clips" in inputs and not microbatch.clips:
                raise WorkloadError(f"microbatches[{i}].clips: {model.name} trains on clips, there are none")
