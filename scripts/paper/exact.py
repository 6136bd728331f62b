"""Optimal orders of a stage graph by constraint programming, within a time limit."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from dip_megatron.schedule import StageGraph


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


def solve_orders(graph: StageGraph, tick: float, limit: float, workers: int = 2) -> Solved:
    """The least iteration time over all orders of forwards and fused backwards, memory left out, by OR-tools' CP-SAT.

    ``graph`` has one memory strategy and durations in whole ``tick``s; ``limit`` is the solver's time in seconds.
    """
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()

    def ticks(seconds: float) -> int:
        return round(seconds / tick)

    horizon = sum(ticks(float(x)) for array in (graph.forward[0], graph.fused[0]) for x in array.ravel())
    horizon += 2 * graph.ranks * sum(ticks(float(h)) for h in graph.hop)
    last = model.new_int_var(0, horizon, "end")
    begin, end = {}, {}
    for p in range(graph.ranks):
        machine = []
        for s in range(graph.rows):
            for kind, seconds in (("F", graph.forward[0, s, p]), ("B", graph.fused[0, s, p])):
                at = model.new_int_var(0, horizon, "")
                machine.append(model.new_fixed_size_interval_var(at, ticks(float(seconds)), ""))
                begin[kind, s, p], end[kind, s, p] = at, at + ticks(float(seconds))
                model.add(end[kind, s, p] <= last)
            model.add(begin["B", s, p] >= end["F", s, p])
        model.add_no_overlap(machine)
    for s in range(graph.rows):
        hop = ticks(float(graph.hop[s]))
        for p in range(1, graph.ranks):
            model.add(begin["F", s, p] >= end["F", s, p - 1] + hop)
            model.add(begin["B", s, p - 1] >= end["B", s, p] + hop)
        for before in graph.previous_rows[s]:
            link = ticks(graph.link_hop(before, s))
            model.add(begin["F", s, 0] >= end["F", before, graph.ranks - 1] + link)
            model.add(begin["B", before, graph.ranks - 1] >= end["B", s, 0] + link)
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
