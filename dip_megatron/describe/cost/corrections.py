"""What measurements make of the cost model's seconds: a straight line per chunk, kind of operation and rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...core import Kind, StageGraph
from ...core.graph import Floats

KINDS = (Kind.F, Kind.B, Kind.W, Kind.BW)
_ARRAYS = {Kind.F: "forward", Kind.B: "backward", Kind.W: "weight", Kind.BW: "fused"}


@dataclass(frozen=True)
class Line:
    """Seconds of one kind of operation of one module's segment: ``fixed[rank] + factor[rank] * model's seconds``."""

    module: str
    segment: int
    kind: Kind
    fixed: tuple[float, ...]
    factor: tuple[float, ...]


@dataclass(frozen=True)
class Corrections:
    """Lines for stages that were measured; others keep the cost model's seconds. Empty: the cost model alone.

    ``overhead[rank]``: seconds between two operations, which are part of what the lines give (see
    :class:`~dip_megatron.core.StageGraph`).
    """

    lines: tuple[Line, ...] = ()
    overhead: tuple[float, ...] = ()

    def apply(self, graph: StageGraph) -> StageGraph:
        """The graph with corrected durations, none negative. What takes no time (a chunk without layers, frozen
        weights) still takes none."""
        if not self.lines:
            return graph
        virtual_microbatches = _virtual_microbatches(graph)
        arrays = {kind: getattr(graph, name).copy() for kind, name in _ARRAYS.items()}
        for line in self.lines:
            here = virtual_microbatches.get((line.module, line.segment))
            if here is None or len(line.factor) != graph.ranks:
                continue
            seconds = arrays[line.kind][:, here, :]
            corrected = np.maximum(np.array(line.fixed) + np.array(line.factor) * seconds, 0.0)
            arrays[line.kind][:, here, :] = np.where(seconds > 0, corrected, 0.0)
        overhead = self.overhead if len(self.overhead) == graph.ranks else ()
        return graph.repriced(overhead=overhead, **{name: arrays[kind] for kind, name in _ARRAYS.items()})


def seconds_of(graph: StageGraph, kind: Kind) -> Floats:
    """The graph's seconds of one kind of operation, ``[C, S, P]``."""
    seconds: Floats = getattr(graph, _ARRAYS[kind])
    return seconds


def _virtual_microbatches(graph: StageGraph) -> dict[tuple[str, int], list[int]]:
    """Rows of each module's segments."""
    virtual_microbatches: dict[tuple[str, int], list[int]] = {}
    for unit in graph.units:
        for segment in range(graph.module(unit.module).segments):
            virtual_microbatches.setdefault((unit.module, segment), []).append(
                graph.virtual_microbatch(unit.id, segment)
            )
    return virtual_microbatches
