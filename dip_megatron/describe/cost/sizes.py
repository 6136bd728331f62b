"""How much work a unit is for its module: tokens, and pairs of tokens that attend to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from ...core.graph import Floats
from ..model import LatentEmbedding, ModuleShape
from ..workload import Microbatch, shares
from .strategies import Counts


@dataclass(frozen=True, eq=False)
class Sizes:
    """Per unit, arrays ``[U]``: ``tokens`` of the module's own sequence; ``pairs``, the sum over packed sequences of
    the squared length; ``window_pairs``, the same with sequences cut into windows (which slide where attention is
    causal); ``condition`` tokens and ``cross_pairs`` of the cross attention; ``outputs``, tokens handed downstream."""

    tokens: Floats
    pairs: Floats
    window_pairs: Floats
    condition: Floats
    cross_pairs: Floats
    outputs: Floats

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, index: Sequence[int] | Counts) -> Sizes:
        """The sizes of some of the units."""
        return Sizes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def largest(self) -> Sizes:
        """One unit that is at least as large as each of these in every respect."""
        return Sizes(*(np.array([getattr(self, f.name).max()]) for f in fields(self)))

    def mean(self) -> Sizes:
        """One unit of the mean size."""
        return Sizes(*(np.array([getattr(self, f.name).mean()]) for f in fields(self)))

    def sharded(self, ranks: int) -> Sizes:
        """What each of so many context-parallel ranks has: its share of every sequence, each token of which meets all
        of its sequence and of its condition."""
        shared = ("tokens", "pairs", "window_pairs", "cross_pairs", "outputs")
        return self if ranks == 1 else replace(self, **{name: getattr(self, name) / ranks for name in shared})

    def rounded(self) -> Sizes:
        """Tokens rounded to a power of two, the rest more coarsely: the few sizes at which memory candidates are
        chosen, which depend on a unit's layers only, not on what it hands on."""
        out = {}
        steps = {"tokens": 1.0, "pairs": 2.0, "window_pairs": 2.0}
        for f in fields(self):
            x, step = getattr(self, f.name), steps.get(f.name, 4.0)
            out[f.name] = np.where(x > 0, np.exp2(step * np.round(np.log2(np.maximum(x, 1.0)) / step)), 0.0)
        out["outputs"] = np.zeros_like(self.outputs)
        return Sizes(**out)

    def table(self) -> Floats:
        """One row per unit, columns in the order of the fields, ``[U, 6]``."""
        return np.stack([getattr(self, f.name) for f in fields(self)], axis=1)

    @staticmethod
    def of(table: Floats) -> Sizes:
        """Inverse of :meth:`table`."""
        return Sizes(*(np.ascontiguousarray(column) for column in table.T))


def instance_sizes(module: ModuleShape, microbatch: Microbatch) -> Floats:
    """Rows (tokens, pairs, window pairs, condition, cross pairs, outputs) of the microbatch's instances of
    ``module``."""
    if module.encodes:
        outputs = np.array(microbatch.encoded.get(module.input, ()), dtype=np.float64)
        lengths = outputs * module.reduction
        return _rows(module, lengths, np.zeros_like(lengths), outputs)
    if module.input == "clips":
        assert isinstance(module.stem, LatentEmbedding)
        stem = module.stem
        lengths = np.array([c.latent_tokens(stem.compression, stem.patch) for c in microbatch.clips], dtype=np.float64)
        prompts = np.array([c.text_tokens for c in microbatch.clips], dtype=np.float64)
        return _rows(module, lengths, prompts if module.layer.cross_attention else np.zeros_like(prompts), lengths)
    if microbatch.clips:
        lengths = np.array([c.text_tokens for c in microbatch.clips], dtype=np.float64)
        return _rows(module, lengths, np.zeros_like(lengths), lengths / module.reduction)
    lengths = np.array(microbatch.sequences or (microbatch.tokens,), dtype=np.float64)
    rows = _rows(module, lengths, np.zeros_like(lengths), lengths / module.reduction)
    return rows.sum(axis=0, keepdims=True)


def _rows(module: ModuleShape, lengths: Floats, condition: Floats, outputs: Floats) -> Floats:
    window = module.layer.window
    pairs = lengths**2
    if window and module.layer.causal:  # slides: of the pairs counted here, half are of later tokens
        windowed = np.where(lengths > window, window * (2 * lengths - window), pairs)
    elif window:
        rest = lengths % window
        windowed = (lengths - rest) * window + rest**2
    else:
        windowed = pairs
    return np.stack([lengths, pairs, windowed, condition, lengths * condition, outputs], axis=1)


def unit_sizes(
    module: ModuleShape, microbatches: Sequence[Microbatch], units: Sequence[tuple[int, int, int]], ranks: int = 1
) -> Sizes:
    """Sizes of units given as (microbatch, first instance, count): of the largest share where the instances of each are
    shared out over ``ranks``."""
    running: dict[int, Floats] = {}
    out = np.zeros((len(units), 6))
    for i, (m, first, count) in enumerate(units):
        if m not in running:
            rows = instance_sizes(module, microbatches[m])
            running[m] = np.vstack([np.zeros((1, 6)), np.cumsum(rows, axis=0)])
        if ranks == 1:
            out[i] = running[m][first + count] - running[m][first]
            continue
        parts = shares(microbatches[m].encoded[module.input][first : first + count], ranks)
        ends = np.array(parts) @ [[1, 1], [0, 1]] + first
        out[i] = (running[m][ends[:, 1]] - running[m][ends[:, 0]]).max(axis=0)
    return Sizes.of(out)


def whole_sizes(module: ModuleShape, microbatches: Sequence[Microbatch]) -> Sizes:
    """Sizes of whole microbatches; zeros where a microbatch holds nothing for the module."""
    return unit_sizes(module, microbatches, [(i, 0, m.instances(module)) for i, m in enumerate(microbatches)])
