"""A schedule: the order of each rank's operations, and the memory strategy of each node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .graph import Ints, OperationGraph
from .operations import Kind, Operation


@dataclass(frozen=True, eq=False)
class Schedule:
    """The order in which each rank executes its operations, and a memory strategy for each node.

    Attributes:
        orders: For each rank, operation codes ``kind * S + s`` (int32) in the order of execution.
        strategy: Which of the graph's C candidates each node uses, ``[S, P]`` (int8).
    """

    orders: tuple[Ints, ...]
    strategy: NDArray[np.int8]

    def operations(self, graph: OperationGraph, rank: int) -> list[Operation]:
        """The rank's operations, in order."""
        return [self.operation(graph, rank, i) for i in range(len(self.orders[rank]))]

    def operation(self, graph: OperationGraph, rank: int, index: int) -> Operation:
        """The operation at place ``index`` of the rank's order."""
        kind, virtual_microbatch = divmod(int(self.orders[rank][index]), graph.virtual_microbatches)
        return graph.operation(Kind(kind), virtual_microbatch, rank)


def check_complete(graph: OperationGraph, schedule: Schedule) -> str | None:
    """Describe the first fault in the orders; None if every rank has each operation exactly once, with F before B
    before W."""
    virtual_microbatches = graph.virtual_microbatches
    if len(schedule.orders) != graph.ranks:
        return f"{len(schedule.orders)} ranks have an order, the graph has {graph.ranks}"
    for rank, order in enumerate(schedule.orders):
        if _complete(graph, rank, order):
            continue
        place: dict[int, int] = {}
        for i, code in enumerate(order.tolist()):
            if not 0 <= code < 4 * virtual_microbatches:
                return f"rank {rank}: operation code {code} is out of range"
            if code in place:
                kind, s = divmod(code, virtual_microbatches)
                return f"rank {rank}: {graph.operation(Kind(kind), s, rank)} comes twice"
            place[code] = i
        for s in range(virtual_microbatches):
            has = {k: place.get(int(k) * virtual_microbatches + s) for k in Kind}
            forward, back, weight, fused = has[Kind.F], has[Kind.B], has[Kind.W], has[Kind.BW]
            if forward is None:
                return f"rank {rank}: {graph.operation(Kind.F, s, rank)} is missing"
            if fused is not None and (back is not None or weight is not None):
                return f"rank {rank}: {graph.operation(Kind.BW, s, rank)} stands beside a B or W of the same unit"
            if not graph.has_backward[s, rank]:
                if fused is not None or back is not None or weight is not None:
                    return f"rank {rank}: {graph.operation(Kind.B, s, rank)} has nothing to train before it"
                continue
            first = fused if fused is not None else back
            if first is None:
                return f"rank {rank}: {graph.operation(Kind.B, s, rank)} is missing"
            if first < forward:
                return f"rank {rank}: {graph.operation(Kind.B, s, rank)} comes before its forward"
            if fused is None and graph.has_weight[s, rank]:
                if weight is None:
                    return f"rank {rank}: {graph.operation(Kind.W, s, rank)} is missing"
                if weight < first:
                    return f"rank {rank}: {graph.operation(Kind.W, s, rank)} comes before its B"
            elif weight is not None or (fused is not None and not graph.has_weight[s, rank]):
                return f"rank {rank}: {graph.operation(Kind.W, s, rank)} asks for weights that are frozen"
    return None


def _complete(graph: OperationGraph, rank: int, order: Ints) -> bool:
    """Whether a rank's order has no fault. Checks all nodes at once, which is fast in the usual case of no fault."""
    virtual_microbatches = graph.virtual_microbatches
    if len(order) and not (order.min() >= 0 and order.max() < 4 * virtual_microbatches):
        return False
    counts = np.bincount(order, minlength=4 * virtual_microbatches)
    if counts.max() > 1:
        return False
    place = np.zeros(4 * virtual_microbatches, dtype=np.int64)
    place[order] = np.arange(len(order))
    forward, back, weight, fused = (
        counts.reshape(4, virtual_microbatches)[int(k)] > 0 for k in (Kind.F, Kind.B, Kind.W, Kind.BW)
    )
    at = place.reshape(4, virtual_microbatches)
    backward, trains = graph.has_backward[:, rank], graph.has_weight[:, rank]
    first = np.where(fused, at[int(Kind.BW)], at[int(Kind.B)])
    in_order = (first > at[int(Kind.F)]) & (~weight | (at[int(Kind.W)] > first))
    return bool(
        np.all(forward)
        and np.all((fused ^ back) == backward)  # exactly one where something trains, else none
        and np.all((fused & trains | weight) == (backward & trains))
        and not np.any(fused & (weight | ~trains))
        and np.all(in_order | ~backward)
    )
