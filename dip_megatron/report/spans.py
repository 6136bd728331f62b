"""What a trace or a picture draws: operations with their time."""

from __future__ import annotations

from dataclasses import dataclass

from ..core import Operation, OperationGraph, Schedule
from ..core.simulate import Timeline


@dataclass(frozen=True)
class Span:
    """One operation on one pipeline rank; ``start`` and ``end`` in seconds since the iteration's start."""

    rank: int
    operation: Operation
    microbatch: int
    start: float
    end: float


def spans_of(graph: OperationGraph, schedule: Schedule, timeline: Timeline) -> list[Span]:
    """The operations of a simulated schedule, without what passes between them."""
    return [
        Span(rank, key, graph.units[key.unit].microbatch, float(start), float(end))
        for rank in range(graph.ranks)
        for key, start, end in zip(
            schedule.operations(graph, rank), timeline.start[rank], timeline.computed[rank], strict=True
        )
    ]
