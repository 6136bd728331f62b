"""Which layers are mixtures of experts whose collectives data-parallel replicas share, and what makes stages *meet*.

With ``EP * ETP / (TP * CP)`` greater than one, so many replicas share one expert-parallel group: they are *coupled*.
The forward and the backward of a chunk with such layers then run on all coupled replicas at once, each with a
microbatch of its own; weight gradients, and chunks without such layers, are each replica's own.
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
"""Of one module, ``[segment][rank][layer]``."""


class ExpertLayersError(ValueError):
    """Expert layers that are not those of a graph; the message names the chunk."""


@dataclass(frozen=True)
class ExpertLayers:
    """The layers with experts of each module that has any: ``modules`` are pairs of a name and, ``[segment][rank]
    [layer]``, whether the layer has. ``repeating``: the memory strategies under which a backward runs the
    collectives of its forward again, those of :func:`.strategies.exchanging_strategies` unless a file says others."""

    modules: tuple[tuple[str, Flags], ...]
    repeating: frozenset[str] = field(default_factory=exchanging_strategies)

    @staticmethod
    def of(
        layers: Mapping[str, Sequence[Sequence[Sequence[bool]]]], repeating: Iterable[str] | None = None
    ) -> ExpertLayers:
        """From ``{module: [segment][rank][layer]}``."""
        modules = [
            (name, tuple(tuple(tuple(map(bool, chunk)) for chunk in row) for row in rows))
            for name, rows in layers.items()
        ]
        if repeating is None:
            return ExpertLayers(tuple(modules))
        return ExpertLayers(tuple(modules), frozenset(repeating))

    @staticmethod
    def every(modules: Iterable[ModalityModule], names: Iterable[str]) -> ExpertLayers:
        """All layers of the modules with these names."""
        wanted = set(names)
        return ExpertLayers.of(
            {m.name: [[[True] * n for n in row] for row in m.layers] for m in modules if m.name in wanted}
        )

    def check(self, modules: Sequence[ModalityModule]) -> None:
        """Raises ExpertLayersError unless each chunk named is one of these modules' and has so many layers."""
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
        """``[S, P]``: whether the stage's chunk has a layer with experts."""
        out = np.zeros((graph.virtual_microbatches, graph.ranks), dtype=np.bool_)
        flags = {name: np.array([[any(c) for c in row] for row in rows]) for name, rows in self.modules}
        for unit in graph.units:
            if unit.module in flags:
                first = graph.first_virtual_microbatch[unit.id]
                out[first : first + len(flags[unit.module])] = flags[unit.module]
        return out

    def chunks(self, graph: OperationGraph) -> Ints:
        """``[S, P]``: the number of the operation's chunk where that has a layer with experts, -1 elsewhere."""
        return np.where(self.meets(graph), chunk_numbers(graph)[:, None], -1).astype(np.int32)

    def repeats(self, graph: OperationGraph) -> NDArray[np.int64]:
        """``[C, S, P]``: which of the chunk's layers with experts run their collectives again in the backward, under
        each memory strategy: bit i of the number is layer i of the chunk."""
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
"""Where replicas that share no experts meet: nowhere."""


def chunk_numbers(graph: OperationGraph) -> Ints:
    """``[S]``: the number of each virtual microbatch's (module, segment)."""
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
    """That a plan is one of a set: it is replica ``replica``'s of ``replicas`` coupled ones, which meet in the stages
    with ``experts``."""

    replica: int
    replicas: int
    experts: ExpertLayers
