"""The least recompute with which a static schedule fits its memory limit: one strategy for all, or one a module."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.graph import OperationGraph
from ..core.order import Schedule
from ..core.simulate import Timeline, graph_arrays, simulate_compiled


@dataclass(frozen=True, eq=False)
class Fitted:
    """A baseline's schedule with its timeline. ``strategy`` is the memory strategy that all its stages use (the leanest
    of any module's, where they differ); ``fits`` says whether every rank stays under its limit (if no strategy does, it
    is the leanest one)."""

    schedule: Schedule
    timeline: Timeline
    strategy: int
    fits: bool


def least_recompute(graph: OperationGraph, build: Callable[[OperationGraph], Sequence[Schedule]]) -> Fitted:
    """Try the graph's memory strategies from the fastest to the leanest, one for all stages, as Megatron's recompute
    flags do; of the schedules that ``build`` offers for the first strategy that fits, the fastest.

    ``build`` gets the graph with that strategy alone. Raises what ``build`` raises.
    """
    best: Fitted | None = None
    for strategy in range(graph.candidates):
        choice = np.full((graph.virtual_microbatches, graph.ranks), strategy, dtype=np.int8)
        projected = graph.project(choice)
        arrays = graph_arrays(projected)
        for schedule in build(projected):
            timeline = simulate_compiled(projected, schedule, arrays)
            fits = bool(np.all(timeline.peak_bytes <= graph.memory_limit))
            fitted = Fitted(Schedule(schedule.orders, choice), timeline, strategy, fits)
            if best is None or _rank(fitted, graph) < _rank(best, graph):
                best = fitted
        if best is not None and best.fits:
            return best
    if best is None:
        raise ValueError("the baseline offers no schedule")
    return best


def least_recompute_by_module(graph: OperationGraph, build: Callable[[OperationGraph], Schedule]) -> Fitted:
    """One memory strategy for all stages of a module, as Megatron's separate settings for ViT and language model allow;
    the fastest choice that fits.

    ``build`` gives the order, which must not depend on times. Raises what it raises.
    """
    orders = build(graph).orders
    modules = sorted({u.module for u in graph.units})
    module = np.array([modules.index(graph.units[int(u)].module) for u in graph.unit_of])
    best: Fitted | None = None
    for strategies in itertools.product(range(graph.candidates), repeat=len(modules)):
        choice = np.repeat(np.array(strategies, dtype=np.int8)[module][:, None], graph.ranks, axis=1)
        timeline = simulate_compiled(graph, Schedule(orders, choice))
        fits = bool(np.all(timeline.peak_bytes <= graph.memory_limit))
        fitted = Fitted(Schedule(orders, choice), timeline, max(strategies), fits)
        if best is None or _rank(fitted, graph) < _rank(best, graph):
            best = fitted
    assert best is not None
    return best


def _rank(fitted: Fitted, graph: OperationGraph) -> tuple[bool, float]:
    """Those that fit come first, by time; the others by how far they are over the limit."""
    over = float(np.max(fitted.timeline.peak_bytes - graph.memory_limit))
    return (not fitted.fits, fitted.timeline.iteration_time if fitted.fits else over)
