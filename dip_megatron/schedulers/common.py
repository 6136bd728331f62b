"""What the baselines share: errors, the operations of a backward, and the check of a mixed graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core.graph import StageGraph
from ..core.operations import Kind
from ..core.order import Schedule


class BaselineError(ValueError):
    """A baseline that can't run on this batch; the message says why and what would help."""


def code(graph: StageGraph, kind: Kind, row: int) -> int:
    """Operation code of ``kind`` on virtual microbatch ``row``, as in :class:`Schedule`."""
    return int(kind) * graph.virtual_microbatches + row


def fused_backward(graph: StageGraph, row: int, rank: int) -> list[int]:
    """The unsplit backward of a stage: BW, or B where the chunk is frozen, or nothing where nothing trains."""
    if not graph.has_backward[row, rank]:
        return []
    return [code(graph, Kind.BW if graph.has_weight[row, rank] else Kind.B, row)]


def input_gradient(graph: StageGraph, row: int, rank: int) -> list[int]:
    """The B of a stage, if it has one."""
    return [code(graph, Kind.B, row)] if graph.has_backward[row, rank] else []


def weight_gradient(graph: StageGraph, row: int, rank: int) -> list[int]:
    """The W of a stage, if it has one."""
    return [code(graph, Kind.W, row)] if graph.has_weight[row, rank] else []


def uniform(graph: StageGraph, orders: Sequence[Sequence[int]], strategy: int = 0) -> Schedule:
    """A schedule whose stages all use one memory strategy."""
    choice = np.full((graph.virtual_microbatches, graph.ranks), strategy, dtype=np.int8)
    return Schedule(tuple(np.array(order, dtype=np.int32) for order in orders), choice)


def mixed_shape(graph: StageGraph) -> tuple[int, int]:
    """(microbatches, segments) of a graph with one module and one unit per microbatch.

    Raises BaselineError for any other graph: Megatron's schedules know model chunks, not modalities.
    """
    if len(graph.modules) != 1:
        names = ", ".join(m.name for m in graph.modules)
        raise BaselineError(
            f"a static schedule needs one module for all layers, the graph has {names}; merge them first"
        )
    return len(graph.units), graph.modules[0].segments
