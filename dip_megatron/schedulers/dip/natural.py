"""Megatron's own order of the same chunks: the candidate that a plan must never be worse than."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...core.graph import OperationGraph
from ...core.order import Schedule
from ...core.simulate.kernels import GraphArrays, simulate_compiled
from ...core.simulate.reference import DeadlockError
from ..common import BaselineError
from ..megatron import interleaved, one_forward_one_backward
from ..segmented import segmented_static

Baseline = Callable[[OperationGraph], Schedule]


def megatron_orders(graph: OperationGraph, arrays: GraphArrays) -> list[tuple[float, Schedule]]:
    """Iteration time and schedule of Megatron's orders, each with the fastest uniform strategy that fits; those that
    can't run on this batch or fit with no strategy are left out."""
    builders: list[Baseline] = [segmented_static]
    if len(graph.modules) == 1:
        builders = [one_forward_one_backward if graph.modules[0].segments == 1 else interleaved, segmented_static]
    found = []
    for build in builders:
        try:
            schedule = build(graph)
        except BaselineError:
            continue
        for c in range(graph.candidates):
            tried = Schedule(schedule.orders, np.full_like(schedule.strategy, c))
            try:
                timeline = simulate_compiled(graph, tried, arrays)
            except DeadlockError:
                break
            if np.all(timeline.peak_bytes <= graph.memory_limit):
                found.append((timeline.iteration_time, tried))
                break
    return found
