"""Optimal orders of a stage graph by constraint programming, within a time limit."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np

from dip_megatron.core import OperationGraph


@dataclass(frozen=True)
class Solved:
    """Best time and proven bound (seconds; time inf if none was found); ``seconds`` that the solver took."""

    time: float
    bound: float
    optimal: bool
    seconds: float = 0.0

    @property
    def found(self) -> bool:
        return self.time < inf


def solve_orders(graph: OperationGraph, tick: float, limit: float, workers: int = 2) -> Solved:
    """The least iteration time over all orders of forwards and fused backwards, memory left out, by OR-tools' CP-SAT.

    ``graph`` has one memory strategy and durations in whole ``tick``s; ``limit`` is the solver's time in seconds.
    """
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()

    def ticks(seconds: float) -> int:
        return round(seconds / tick)

    backward = np.where(graph.has_weight, graph.fused[0], np.where(graph.has_backward, graph.backward[0], 0.0))
    horizon = sum(ticks(float(x)) for x in (*graph.forward[0].ravel(), *backward.ravel()))
    horizon += 2 * graph.ranks * sum(ticks(float(h)) for h in graph.transfer)
    last = model.new_int_var(0, horizon, "end")
    begin, end = {}, {}
    for p in range(graph.ranks):
        machine = []
        for s in range(graph.virtual_microbatches):
            operations = [("F", graph.forward[0, s, p])] + [("B", backward[s, p])] * bool(graph.has_backward[s, p])
            for kind, seconds in operations:
                at = model.new_int_var(0, horizon, "")
                machine.append(model.new_fixed_size_interval_var(at, ticks(float(seconds)), ""))
                begin[kind, s, p], end[kind, s, p] = at, at + ticks(float(seconds))
                model.add(end[kind, s, p] <= last)
            if graph.has_backward[s, p]:
                model.add(begin["B", s, p] >= end["F", s, p])
        model.add_no_overlap(machine)

    # Forwards along the edges, and backwards the other way where both ends have one.
    edges = graph.edges
    for source, target, transfer in zip(edges.source, edges.target, edges.transfer, strict=True):
        (s, p), (t, q) = divmod(int(source), graph.ranks), divmod(int(target), graph.ranks)
        model.add(begin["F", t, q] >= end["F", s, p] + ticks(float(transfer)))
        if graph.has_backward[s, p] and graph.has_backward[t, q]:
            model.add(begin["B", s, p] >= end["B", t, q] + ticks(float(transfer)))
    model.minimize(last)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit
    solver.parameters.num_workers = workers
    status = solver.solve(model)
    known = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return Solved(
        solver.objective_value * tick if known else inf, max(0.0, solver.best_objective_bound) * tick,
        status == cp_model.OPTIMAL,
    )  # fmt: skip
