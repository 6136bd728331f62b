"""Synthetic workloads: seeded draws from distributions with published means, packed like real data.

A mix is described by a YAML file in ``configs/workloads`` (each number there with its source) and gives any number of
iterations; equal arguments give equal batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..files import ConfigurationError, read_yaml, resolve
from ..model import MultimodalModel, Packing
from .batch import Clip, GlobalBatch, Microbatch, WorkloadError
from .files import read_workload
from .packing import Sample, pack_clips, pack_documents

# What a draw may ask for at most: whatever a file says, drawing a batch ends.
MOST = 1e9
MOST_IMAGES = 1e4
MOST_MICROBATCHES = 100_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


Weight = Annotated[float, Field(ge=1e-9, le=MOST)]
Bounded = Annotated[int, Field(ge=1, le=10**6)]
Pixels = Annotated[int, Field(ge=1, le=2**16)]


class _Spread(_Strict):
    """A log-normal quantity by its mean and the standard deviation of its logarithm (0: constant)."""

    mean: float = Field(gt=0, le=MOST)
    sigma: float = Field(default=0.0, ge=0, le=3)

    def draw(self, random: np.random.Generator) -> float:
        return float(self.mean * np.exp(random.normal(-0.5 * self.sigma**2, self.sigma))) if self.sigma else self.mean


class _Instances(_Strict):
    """Instances of one more kind: ``share`` of the documents have one."""

    share: float = Field(ge=0, le=1)
    tokens: _Spread


class _Source(_Strict):
    """One corpus. ``images`` a document: exactly one, or 1 + a geometric count with mean ``mean_images``; 0: none.
    ``others``: what documents have of further kinds, drawn for models that read them."""

    name: str
    weight: Weight
    text_tokens: _Spread
    mean_images: float = Field(default=0.0, ge=0, le=MOST_IMAGES)
    image_tokens: _Spread | None = None
    audio_share: float = Field(default=0.0, ge=0, le=1)
    audio_tokens: _Spread | None = None
    others: dict[str, _Instances] = Field(default_factory=dict)


class _Documents(_Strict):
    kind: Literal["documents"]
    blend: Literal["document", "microbatch"] = "document"
    sources: Annotated[list[_Source], Field(min_length=1)]


class _ClipSource(_Strict):
    name: str
    weight: Weight
    seconds: _Spread
    text_tokens: _Spread


class _Clips(_Strict):
    kind: Literal["clips"]
    sizes: Annotated[list[tuple[Pixels, Pixels]], Field(min_length=1)]
    sources: Annotated[list[_ClipSource], Field(min_length=1)]


class _Bounds(_Strict):
    """Image-count bounds: in the rising part the lower bound goes from 0 to ``lower`` while the upper stays at
    ``upper``; then both fall to 0 over the rest of the period."""

    kind: Literal["image_bounds"]
    lower: Bounded
    upper: Bounded
    rising: Bounded
    period: Bounded
    image_tokens: Bounded | None = None


class _Mix(_Strict):
    name: str
    iterations: Annotated[int, Field(ge=1, le=MOST_MICROBATCHES)] = 1
    microbatches: Annotated[int, Field(ge=1, le=MOST_MICROBATCHES)] = 16
    draw: Annotated[_Documents | _Clips | _Bounds, Field(discriminator="kind")]


def load_workload(
    name_or_path: str | Path,
    model: MultimodalModel,
    iterations: int | None = None,
    microbatches: int | None = None,
    seed: int = 0,
) -> tuple[GlobalBatch, ...]:
    """Batches by shipped name (``vlm-mix``), mix YAML, or workload file (``.jsonl``), checked against ``model``.

    Of a workload file the first ``iterations`` batches are taken (None: all), with their first ``microbatches``
    microbatches; of a mix None means the file's own numbers. Raises WorkloadError or ConfigurationError with file and
    place.
    """
    for name, value in (("iterations", iterations), ("microbatches", microbatches)):
        if value is not None and not 1 <= value <= MOST_MICROBATCHES:
            raise WorkloadError(f"{name_or_path}: {name}: must be 1 to {MOST_MICROBATCHES}, got {value}")
    path = resolve("workloads", name_or_path)
    if path.suffix in (".jsonl", ".json"):
        batches = read_workload(path)[:iterations]
        if microbatches is not None:
            batches = tuple(GlobalBatch(b.microbatches[:microbatches]) for b in batches)
    else:
        mix = read_yaml(path, _Mix)
        count, size = iterations or mix.iterations, microbatches or mix.microbatches
        batches = tuple(_draw(path, mix, model, count, size, np.random.default_rng(seed)))
    for i, batch in enumerate(batches):
        try:
            batch.check(model)
        except WorkloadError as error:
            raise WorkloadError(f"{path}:{i + 1}: {error}") from error
    return batches


def _draw(
    path: Path, mix: _Mix, model: MultimodalModel, iterations: int, microbatches: int, random: np.random.Generator
) -> Iterator[GlobalBatch]:
    draw, packing = mix.draw, model.packing
    if isinstance(draw, _Bounds):
        for i in range(iterations):
            yield GlobalBatch(tuple(_bounded(draw, packing, i, random) for _ in range(microbatches)))
        return
    kinds = {m.input for m in model.modules}
    if isinstance(draw, _Clips):
        packed = [pack_clips(_clips(draw, packing, random), packing)]
        weights = np.ones(1)
    elif draw.blend == "document":
        packed = [pack_documents(_documents(draw.sources, packing, kinds, random), packing)]
        weights = np.ones(1)
    else:
        packed = [pack_documents(_documents([s], packing, kinds, random), packing) for s in draw.sources]
        weights = np.array([s.weight for s in draw.sources])
    if not isinstance(draw, _Clips) and any(m.input == "clips" for m in model.modules):
        raise ConfigurationError(f"{path}: draw.kind: documents don't feed {model.name}, which trains on clips")
    for _ in range(iterations):
        choice = random.choice(len(packed), size=microbatches, p=weights / weights.sum())
        yield GlobalBatch(tuple(next(packed[int(c)]) for c in choice))


def _documents(
    sources: list[_Source], packing: Packing, kinds: set[str], random: np.random.Generator
) -> Iterator[Sample]:
    weights = np.array([s.weight for s in sources])
    while True:
        source = sources[int(random.choice(len(sources), p=weights / weights.sum()))]
        count = 0
        if source.mean_images > 0:
            # A geometric count from 1 has its mean at 1/p; below one image a document, only some documents have one.
            count = int(random.geometric(1 / source.mean_images)) if source.mean_images >= 1 else int(
                random.random() < source.mean_images
            )  # fmt: skip
        images = tuple(
            packing.image_tokens if source.image_tokens is None else max(1, round(source.image_tokens.draw(random)))
            for _ in range(count)
        )
        audios: tuple[int, ...] = ()
        if "audios" in kinds and source.audio_tokens is not None and random.random() < source.audio_share:
            audios = (max(1, round(source.audio_tokens.draw(random))),)
        others = {
            kind: (max(1, round(instances.tokens.draw(random))),)
            for kind, instances in source.others.items()
            if kind in kinds and random.random() < instances.share
        }
        yield Sample(max(1, round(source.text_tokens.draw(random))), images, audios, others)


def _clips(draw: _Clips, packing: Packing, random: np.random.Generator) -> Iterator[Clip]:
    weights = np.array([s.weight for s in draw.sources])
    while True:
        source = draw.sources[int(random.choice(len(draw.sources), p=weights / weights.sum()))]
        height, width = draw.sizes[int(random.integers(len(draw.sizes)))]
        frames = max(1, round(source.seconds.draw(random) * packing.fps))
        yield Clip(max(1, round(source.text_tokens.draw(random))), frames, height, width)


def image_bounds(draw_lower: int, draw_upper: int, rising: int, period: int, iteration: int) -> tuple[int, int]:
    """Bounds of the image count in iteration ``iteration`` (from 0) of the paper's dynamic run (section 6)."""
    step = iteration % period
    if step < rising:
        return round(draw_lower * step / max(1, rising - 1)), draw_upper
    left = (period - 1 - step) / (period - rising)
    return round(draw_lower * left), round(draw_upper * left)


def _bounded(draw: _Bounds, packing: Packing, iteration: int, random: np.random.Generator) -> Microbatch:
    low, high = image_bounds(draw.lower, draw.upper, draw.rising, draw.period, iteration)
    tokens = draw.image_tokens or packing.image_tokens
    count = min(int(random.integers(low, high + 1)), packing.max_images, packing.max_tokens // tokens)
    return Microbatch(packing.max_tokens - count * tokens, (tokens,) * count)
