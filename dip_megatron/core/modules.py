"""The modality modules of a model as they are cut, and the sub-microbatches that pass through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ModalityModule:
    """One network of the model (ViT, LLM, DiT), cut into ``segments`` passes over all ranks.

    Attributes:
        name: Name of the module.
        layers: Number of transformer layers of each chunk, ``[segment][rank]``.
        upstream: Names of the modules whose outputs feed this module's first segment.
        trainable: Whether each chunk has weight gradients, ``[segment][rank]``. For example, a frozen ViT with a
            trained projector is trainable only in its last chunk. Empty means that all chunks are.
        reversed: Whether each segment runs from the last rank to rank 0, as the second half of a V-shaped placement
            does. Empty means that none does.
        replicated: Whether every rank holds the whole module, in one segment (``layers[0][rank]`` are all of its
            layers). Each of its units then runs on one rank, and its weight gradients are summed over the ranks.
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
    """The chunks that each rank has, as (module, segment). A chunk's position is its number."""
    return tuple((m.name, k) for m in modules for k in range(m.segments))


def trained_before(modules: Sequence[ModalityModule]) -> dict[str, list[list[bool]]]:
    """For each module, ``[segment][rank]``: whether anything before the chunk in the model trains, so that a gradient
    has to pass through the chunk."""
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

    Attributes:
        id: Position in :attr:`OperationGraph.units`.
        module: Name of the module that processes it.
        microbatch: Number of its microbatch.
        first: First of the microbatch's instances (images, clips, packed sequences) that it holds.
        count: Number of instances.
        downstream: Ids of the downstream units that wait for it.
        rank: The rank on which a unit of a replicated module runs; None for other units, which pass over all ranks.
    """

    id: int
    module: str
    microbatch: int
    first: int = 0
    count: int = 1
    downstream: tuple[int, ...] = ()
    rank: int | None = None
