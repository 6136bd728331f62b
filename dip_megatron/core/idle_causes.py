"""Why a rank was idle: whether the data of its next operation was there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .graph import Floats, Ints, OperationGraph
from .operations import Kind


@dataclass(frozen=True, eq=False)
class IdleCauses:
    """Seconds one rank was idle before each of its operations: ``waiting`` while a stage that it needs still ran on
    another rank, ``between`` while all of them had ended (transport, launching, bookkeeping)."""

    waiting: Floats
    between: Floats


def idle_before(
    graph: OperationGraph, orders: Sequence[Ints], start: Sequence[Floats], end: Sequence[Floats]
) -> tuple[IdleCauses, ...]:
    """One for each rank. ``start[rank][i]`` and ``end[rank][i]`` are seconds, on one clock for all ranks that starts
    with the iteration, of the operation ``orders[rank][i]`` (``kind * S + s``)."""
    ended = {kind: np.full(graph.virtual_microbatches * graph.ranks, -np.inf) for kind in (Kind.F, Kind.B)}
    for rank, order in enumerate(orders):
        kinds, nodes = order // graph.virtual_microbatches, (order % graph.virtual_microbatches) * graph.ranks + rank
        ended[Kind.F][nodes[kinds == Kind.F]] = end[rank][kinds == Kind.F]
        backward = (kinds == Kind.B) | (kinds == Kind.BW)
        ended[Kind.B][nodes[backward]] = end[rank][backward]
    edges = graph.edges
    ready = {kind: np.full(graph.virtual_microbatches * graph.ranks, -np.inf) for kind in (Kind.F, Kind.B)}
    np.maximum.at(ready[Kind.F], edges.target, ended[Kind.F][edges.source])
    np.maximum.at(ready[Kind.B], edges.source, ended[Kind.B][edges.target])
    found = []
    for rank, order in enumerate(orders):
        kinds, nodes = order // graph.virtual_microbatches, (order % graph.virtual_microbatches) * graph.ranks + rank
        arrived = np.where(kinds == Kind.F, ready[Kind.F][nodes], ready[Kind.B][nodes])
        arrived[kinds == Kind.W] = -np.inf  # its own B is on this rank
        free = np.concatenate([[0.0], end[rank][:-1]]) if len(order) else np.zeros(0)
        idle = np.maximum(start[rank] - free, 0.0)
        waiting = np.clip(arrived - free, 0.0, idle)
        found.append(IdleCauses(waiting, idle - waiting))
    return tuple(found)
