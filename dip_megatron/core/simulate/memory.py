"""Memory over an iteration: what each rank holds at each moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..graph import Floats, OperationGraph
from ..operations import Kind
from ..order import Schedule


@dataclass(frozen=True, eq=False)
class MemoryLine:
    """Bytes that one rank holds, static ones included: ``held[i]`` from ``seconds[i]`` on, until ``seconds[i + 1]``."""

    seconds: Floats
    held: Floats


def memory_over_time(
    graph: OperationGraph, schedule: Schedule, start: Sequence[Floats], end: Sequence[Floats]
) -> tuple[MemoryLine, ...]:
    """One line for each rank, by the rule that :func:`simulate` states.

    ``start[rank][i]`` and ``end[rank][i]``: seconds of the operation ``schedule.orders[rank][i]``, planned or measured.
    """
    lines = []
    for rank, order in enumerate(schedule.orders):
        kinds, rows = order // graph.virtual_microbatches, order % graph.virtual_microbatches
        choice = schedule.strategy[rows, rank]
        activation = graph.activation[choice, rows, rank]
        deferred = graph.deferred_activation[choice, rows, rank]
        leaves = np.where(kinds == Kind.W, -deferred, -activation)
        split = (kinds == Kind.B) & graph.has_weight[rows, rank]
        leaves = np.where(split, deferred - activation, leaves)
        leaves = np.where((kinds == Kind.F) & graph.has_backward[rows, rank], 0.0, leaves)
        # Each operation takes at its start and gives at its end; in the order the rank runs them, never sorted by time,
        # so that an end and the next start at one moment count as they do in the simulator.
        moments = np.stack([start[rank], end[rank]], axis=1).ravel()
        changes = np.stack([np.where(kinds == Kind.F, activation, 0.0), leaves], axis=1).ravel()
        static = float(graph.static_bytes[rank])
        lines.append(MemoryLine(np.concatenate([[0.0], moments]), static + np.concatenate([[0.0], changes.cumsum()])))
    return tuple(lines)
