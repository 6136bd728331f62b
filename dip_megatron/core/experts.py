"""The layers with mixtures of experts whose collectives data-parallel replicas share, and the operations that therefore
*meet*.

If ``EP * ETP / (TP * CP)`` is greater than one, that many replicas share one expert-parallel group: they are *coupled*.
The forward and the input gradient of a chunk with such layers then run on all coupled replicas at once, each with its
own microbatch. Weight gradients, and chunks without such layers, run independently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .graph import Ints, OperationGraph
from .modules import ModalityModule, chunks_of
from .strategies import exchanging_strategies, parse_strategy

Flags = tuple[tuple[tuple[bool, ...], ...], ...]
"""Flags of one module, ``[segment][rank][layer]``."""


class ExpertLayersError(ValueError):
    """Expert layers that do not match a graph. The message names the module."""


@dataclass(frozen=True)
class ExpertLayers:
    """The layers with experts of each module that has any.

    Attributes:
        modules: Pairs of a module's name and flags ``[segment][rank][layer]`` that say whether the layer has experts.
        repeating: Memory strategies under which a backward repeats the collectives of its forward; by default those of
            :func:`.strategies.exchanging_strategies`. A plan file may name others.
    """

    modules: tuple[tuple[str, Flags], ...]
    repeating: frozenset[str] = field(default_factory=exchanging_strategies)

    @staticmethod
    def of(
        layers: Mapping[str, Sequence[Sequence[Sequence[bool]]]], repeating: Iterable[str] | None = None
    ) -> ExpertLayers:
        """Make one from ``{module: [segment][rank][layer]}``."""
        modules = [
            (name, tuple(tuple(tuple(map(bool, chunk)) for chunk in row) for row in rows))
            for name, rows in layers.items()
        ]
        if repeating is None:
            return ExpertLayers(tuple(modules))
        return ExpertLayers(tuple(modules), frozenset(repeating))

    @staticmethod
    def every(modules: Iterable[ModalityModule], names: Iterable[str]) -> ExpertLayers:
        """All layers of the modules ``names``."""
        wanted = set(names)
        return ExpertLayers.of(
            {m.name: [[[True] * n for n in row] for row in m.layers] for m in modules if m.name in wanted}
        )

    def check(self, modules: Sequence[ModalityModule]) -> None:
        """Raise ExpertLayersError unless every named module is one of ``modules``, with as many layers in each
        chunk."""
        known = {m.name: m for m in modules}
        for name, rows in self.modules:
            if name not in known:
                raise ExpertLayersError(f"expert layers of {name!r}: the model has {', '.join(known)}")
            shape = tuple(tuple(len(chunk) for chunk in row) for row in rows)
            if shape != known[name].layers:
                raise ExpertLayersError(
                    f"expert layers of {name!r}: chunks of {shape} layers, not {known[name].layers}"
                )

    def meets(self, graph: OperationGraph) -> NDArray[np.bool_]:
        """Whether the node's chunk has a layer with experts, ``[S, P]``."""
        out = np.zeros((graph.virtual_microbatches, graph.ranks), dtype=np.bool_)
        flags = {name: np.array([[any(c) for c in row] for row in rows]) for name, rows in self.modules}
        for unit in graph.units:
            if unit.module in flags:
                first = graph.first_virtual_microbatch[unit.id]
                out[first : first + len(flags[unit.module])] = flags[unit.module]
        return out

    def chunks(self, graph: OperationGraph) -> Ints:
        """The number of the node's chunk if it has a layer with experts, else -1; ``[S, P]``."""
        return np.where(self.meets(graph), chunk_numbers(graph)[:, None], -1).astype(np.int32)

    def repeats(self, graph: OperationGraph) -> NDArray[np.int64]:
        """Which of the chunk's layers with experts repeat their collectives in the backward, under each memory
        strategy, ``[C, S, P]``. Bit i of a number is layer i of the chunk."""
        out = np.zeros(graph.forward.shape, dtype=np.int64)
        flags = dict(self.modules)
        if not graph.strategies:
            return out
        for s, unit in enumerate(graph.unit_of.tolist()):
            rows = flags.get(graph.units[unit].module)
            if rows is None:
                continue
            for rank, chunk in enumerate(rows[graph.segment(s)]):
                for c, text in enumerate(graph.strategies[s][rank]):
                    if text != "none":
                        out[c, s, rank] = repeated(chunk, text, self.repeating)
        return out


NO_EXPERTS = ExpertLayers((), frozenset())
"""For replicas that share no experts."""


def chunk_numbers(graph: OperationGraph) -> Ints:
    """The number of each virtual microbatch's chunk (module, segment), ``[S]``."""
    number = {chunk: n for n, chunk in enumerate(chunks_of(graph.modules))}
    return np.array(
        [number[u.module, k] for u in graph.units for k in range(graph.module(u.module).segments)], dtype=np.int32
    )


@lru_cache(maxsize=1 << 16)
def repeated(chunk: tuple[bool, ...], strategy: str, repeating: frozenset[str]) -> int:
    """Which layers with experts (``chunk[i]``) a backward under ``strategy`` repeats, as bits. Raises StrategyError."""
    names = parse_strategy(strategy, len(chunk))
    return sum(1 << i for i, (has, name) in enumerate(zip(chunk, names, strict=True)) if has and name in repeating)


@dataclass(frozen=True)
class Coupled:
    """Marks a plan as that of replica ``replica`` in a set of ``replicas`` coupled replicas, which meet in the layers
    ``experts``."""

    replica: int
    replicas: int
    experts: ExpertLayers
