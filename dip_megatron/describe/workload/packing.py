"""Samples packed into microbatches, greedily and in the order they come, as a data loader does (section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ..model import Packing
from .batch import Clip, Microbatch, WorkloadError

MOST_SAMPLES = 100_000


@dataclass(frozen=True)
class Sample:
    """One document: its text tokens, and the language-model tokens of each of its images, audio clips and instances of
    further kinds, by name."""

    text_tokens: int
    images: tuple[int, ...] = ()
    audios: tuple[int, ...] = ()
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.text_tokens + sum(self.images) + sum(self.audios) + sum(map(sum, self.others.values()))


def cut(sample: Sample, packing: Packing) -> Sample:
    """The sample cut down to what one microbatch may hold: images that don't fit go first, then text."""
    room = packing.max_tokens

    def fitting(instances: tuple[int, ...]) -> tuple[int, ...]:
        nonlocal room
        kept = []
        for tokens in instances:
            if tokens <= room:
                kept.append(tokens)
                room -= tokens
        return tuple(kept)

    images, audios = fitting(sample.images[: packing.max_images]), fitting(sample.audios)
    others = {kind: fitting(instances) for kind, instances in sample.others.items()}
    return Sample(min(sample.text_tokens, room), images, audios, others)


def pack_documents(samples: Iterable[Sample], packing: Packing) -> Iterator[Microbatch]:
    """Microbatches of whole samples: one is closed when the next sample would pass ``max_tokens`` or ``max_images``.

    The last, unfinished microbatch is not given out, nor are samples without any token. Raises WorkloadError where one
    would hold more than ``MOST_SAMPLES``.
    """
    held: list[Sample] = []
    tokens = images = 0
    for whole in samples:
        sample = cut(whole, packing)
        if sample.tokens == 0:
            continue
        if held and (tokens + sample.tokens > packing.max_tokens or images + len(sample.images) > packing.max_images):
            yield _join(held)
            held, tokens, images = [], 0, 0
        if len(held) == MOST_SAMPLES:
            raise WorkloadError(
                f"a microbatch of {packing.max_tokens} tokens takes more than {MOST_SAMPLES} documents like these; "
                "lower packing.max_tokens, or draw longer documents"
            )
        held.append(sample)
        tokens += sample.tokens
        images += len(sample.images)


def _join(samples: list[Sample]) -> Microbatch:
    kinds = {kind for s in samples for kind in s.others}
    return Microbatch(
        text_tokens=sum(s.text_tokens for s in samples),
        images=tuple(t for s in samples for t in s.images),
        audios=tuple(t for s in samples for t in s.audios),
        sequences=tuple(s.tokens for s in samples),
        others={kind: tuple(t for s in samples for t in s.others.get(kind, ())) for kind in kinds},
    )


def pack_clips(clips: Iterable[Clip], packing: Packing) -> Iterator[Microbatch]:
    """Microbatches of clips: up to ``max_clips`` of them and less than ``max_seconds`` of video in all, except that a
    clip of exactly ``max_seconds`` stands alone. Longer clips are cut to ``max_seconds``. The last, unfinished
    microbatch is not given out."""
    limit = int(packing.max_seconds * packing.fps)
    held: list[Clip] = []
    frames = 0
    for whole in clips:
        clip = Clip(whole.text_tokens, min(whole.frames, limit), whole.height, whole.width)
        if held and (len(held) == packing.max_clips or frames + clip.frames >= limit):
            yield Microbatch(clips=tuple(held))
            held, frames = [], 0
        held.append(clip)
        frames += clip.frames
