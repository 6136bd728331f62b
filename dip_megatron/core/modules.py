"""What a stage graph is of: modality modules as they are cut, and the sub-microbatches that pass through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ModalityModule:
    """One network of the model (ViT, LLM, DiT), cut into ``segments`` passes over all ranks.

    ``layers[segment][rank]`` is the number of transformer layers of each chunk. ``upstream`` names the modules whose
    outputs feed this module's first segment. ``trainable[segment][rank]`` says whether the chunk has weight gradients
    (a frozen ViT with a trained projector is trainable in its very last chunk only); empty means all of it.
    ``reversed[segment]`` is True for a segment that runs from the last rank to rank 0 (the second half of a V-shaped
    placement); empty means that none does. A ``replicated`` module stands whole on every rank, in one segment
    (``layers[0][rank]`` are all of its layers); each of its units runs on one rank, and what they leave of weight
    gradients is summed over the ranks.
    """

    name: str
    layers: tuple[tuple[int, ...], ...]
    upstream: tuple[str, ...] = ()
    trainable: tuple[tuple[bool, ...], ...] = ()
    reversed: tuple[bool, ...] = ()
    replicated: bool = False

    @property
    def segments(self) -> int:
        return len(self.layers)

    def trains(self, segment: int, rank: int) -> bool:
        return self.trainable[segment][rank] if self.trainable else True

    def runs_back(self, segment: int) -> bool:
        return self.reversed[segment] if self.reversed else False


def chunks_of(modules: Sequence[ModalityModule]) -> tuple[tuple[str, int], ...]:
    """(module, segment) of each chunk that a rank has, in the order that numbers them."""
    return tuple((m.name, k) for m in modules for k in range(m.segments))


def trained_before(modules: Sequence[ModalityModule]) -> dict[str, list[list[bool]]]:
    """``[segment][rank]`` of each module: whether anything before the chunk in the model trains, so that a gradient has
    to pass through it."""
    reached: dict[str, bool] = {}
    flags: dict[str, list[list[bool]]] = {}
    for m in modules:
        alive = any(reached[u] for u in m.upstream)
        flags[m.name] = [[False] * len(line) for line in m.layers]
        for k, line in enumerate(m.layers):
            ranks = range(len(line))
            for r in reversed(ranks) if m.runs_back(k) else ranks:
                flags[m.name][k][r] = alive
                alive = alive or (m.trains(k, r) and not m.replicated)
        reached[m.name] = alive or (m.replicated and any(m.trains(0, r) for r in range(len(m.layers[0]))))
    return flags


@dataclass(frozen=True)
class Unit:
    """A sub-microbatch: the slice of one microbatch that one module processes at a time.

    ``id`` is its position in :attr:`OperationGraph.units`. ``first`` and ``count`` say which instances (images, clips,
    packed sequences) of the microbatch it holds. ``downstream`` are the ids of the downstream units that wait for it.
    ``rank`` is where a unit of a replicated module runs; None of any other, which passes over all ranks.
    """

    id: int
    module: str
    microbatch: int
    first: int = 0
    count: int = 1
    downstream: tuple[int, ...] = ()
    rank: int | None = None
