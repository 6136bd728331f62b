"""What the baselines share: errors, the operations of a backward, and the check of a mixed graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core.graph import OperationGraph
from ..core.operations import Kind
from ..core.order import Schedule


class BaselineError(ValueError):
    """A baseline that can't run on this batch; the message says why and what would help."""


def code(graph: OperationGraph, kind: Kind, virtual_microbatch: int) -> int:
    """Operation code of ``kind`` on ``virtual_microbatch``, as in :class:`Schedule`."""
    return int(kind) * graph.virtual_microbatches + virtual_microbatch


def fused_backward(graph: OperationGraph, virtual_microbatch: int, rank: int) -> list[int]:
    """The unsplit backward of a stage: BW, or B where the chunk is frozen, or nothing where nothing trains."""
    if not graph.has_backward[virtual_microbatch, rank]:
        return []
    return [code(graph, Kind.BW if graph.has_weight[virtual_microbatch, rank] else Kind.B, virtual_microbatch)]


def input_gradient(graph: OperationGraph, virtual_microbatch: int, rank: int) -> list[int]:
    """The B of a stage, if it has one."""
    return [code(graph, Kind.B, virtual_microbatch)] if graph.has_backward[virtual_microbatch, rank] else []


def weight_gradient(graph: OperationGraph, virtual_microbatch: int, rank: int) -> list[int]:
    """The W of a stage, if it has one."""
    return [code(graph, Kind.W, virtual_microbatch)] if graph.has_weight[virtual_microbatch, rank] else []


def uniform(graph: OperationGraph, orders: Sequence[Sequence[int]], strategy: int = 0) -> Schedule:
    """A schedule whose stages all use one memory strategy."""
    choice = np.full((graph.virtual_microbatches, graph.ranks), strategy, dtype=np.int8)
    return Schedule(tuple(np.array(order, dtype=np.int32) for order in orders), choice)


def mixed_shape(graph: OperationGraph) -> tuple[int, int]:
    """(microbatches, segments) of a graph with one module and one unit per microbatch.

    Raises BaselineError for any other graph: Megatron's schedules know model chunks, not modalities.
    """
    if len(graph.modules) != 1:
        names = ", ".join(m.name for m in graph.modules)
        raise BaselineError(
            f"a static schedule needs one module for all layers, the graph has {names}; merge them first"
        )
    return len(graph.units), graph.modules[0].segments
