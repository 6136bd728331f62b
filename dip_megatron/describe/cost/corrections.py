"""What measurements make of the cost model's seconds: a straight line per chunk, kind of operation and rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...core import Kind, OperationGraph
from ...core.graph import Floats

KINDS = (Kind.F, Kind.B, Kind.W, Kind.BW)
_ARRAYS = {Kind.F: "forward", Kind.B: "backward", Kind.W: "weight", Kind.BW: "fused"}


_LEAST = 0.01


@dataclass(frozen=True)
class Line:
    """Seconds of one kind of operation of one module's segment: ``fixed[rank] + factor[rank] * model's seconds``, but
    no less than a hundredth of the second part: what takes time for the model never takes none, and can be told from
    the corrected seconds."""

    module: str
    segment: int
    kind: Kind
    fixed: tuple[float, ...]
    factor: tuple[float, ...]

    def corrected(self, model: Floats) -> Floats:
        """The model's seconds ``[..., ranks]``, corrected; where they are zero, zero."""
        fixed, factor = np.array(self.fixed), np.array(self.factor)
        return np.where(model > 0, np.maximum(fixed + factor * model, _LEAST * factor * model), 0.0)

    def model(self, corrected: Floats) -> Floats:
        """Inverse of :meth:`corrected`; zero where a factor is."""
        fixed, factor = np.array(self.fixed), np.array(self.factor)
        slope = np.where(factor > 0, factor, 1.0)
        model = np.minimum((corrected - fixed) / slope, corrected / (_LEAST * slope))
        return np.where((corrected > 0) & (factor > 0), np.maximum(model, 0.0), 0.0)


@dataclass(frozen=True)
class Corrections:
    """Lines for stages that were measured; others keep the cost model's seconds. Empty: the cost model alone.

    ``overhead[rank]``: seconds between two operations, which are part of what the lines give (see
    :class:`~dip_megatron.core.OperationGraph`).
    """

    lines: tuple[Line, ...] = ()
    overhead: tuple[float, ...] = ()

    def apply(self, graph: OperationGraph) -> OperationGraph:
        """The graph with corrected durations. What takes no time (a chunk without layers, frozen weights) still takes
        none."""
        if not self.lines:
            return graph
        virtual_microbatches = _virtual_microbatches(graph)
        arrays = {kind: getattr(graph, name).copy() for kind, name in _ARRAYS.items()}
        for line in self.lines:
            here = virtual_microbatches.get((line.module, line.segment))
            if here is None or len(line.factor) != graph.ranks:
                continue
            arrays[line.kind][:, here, :] = line.corrected(arrays[line.kind][:, here, :])
        overhead = self.overhead if len(self.overhead) == graph.ranks else ()
        return graph.repriced(overhead=overhead, **{name: arrays[kind] for kind, name in _ARRAYS.items()})


def seconds_of(graph: OperationGraph, kind: Kind) -> Floats:
    """The graph's seconds of one kind of operation, ``[C, S, P]``."""
    seconds: Floats = getattr(graph, _ARRAYS[kind])
    return seconds


def _virtual_microbatches(graph: OperationGraph) -> dict[tuple[str, int], list[int]]:
    """Rows of each module's segments."""
    virtual_microbatches: dict[tuple[str, int], list[int]] = {}
    for unit in graph.units:
        for segment in range(graph.module(unit.module).segments):
            virtual_microbatches.setdefault((unit.module, segment), []).append(
                graph.virtual_microbatch(unit.id, segment)
            )
    return virtual_microbatches
