"""Optimal schedules of small stage graphs by constraint programming: what the search and the bound are judged by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from dip_megatron.core import OperationGraph

TICKS = 1000  # per second: durations must be whole milliseconds


@dataclass(frozen=True)
class Optimum:
    """Best time found and the proven bound (seconds), equal if ``optimal``; not ``feasible``: proven that none fits."""

    time: float
    bound: float
    optimal: bool
    feasible: bool


def solve(graph: OperationGraph, *, split: bool = True, seconds: float = 20.0, workers: int = 1) -> Optimum:
    """Minimise the iteration time over all orders, strategies, and choices of split or fused backwards.

    Variables: start of F, of B (or BW) and of W for each stage; one strategy each. Constraints: one operation at a time
    on a rank, the stage graph's precedences and transfers, and per rank the bytes that are held: activation from the
    start of F to the end of B or BW, what W waits for from there to the end of W.
    """
    model = cp_model.CpModel()
    virtual_microbatches, ranks, count = graph.virtual_microbatches, graph.ranks, graph.candidates

    def ticks(seconds_: float) -> int:
        whole = round(seconds_ * TICKS)
        assert abs(whole - seconds_ * TICKS) < 1e-6, "durations must be whole milliseconds"
        return whole

    horizon = sum(
        ticks(graph.forward[:, s, p].max()) + ticks(graph.backward[:, s, p].max()) + ticks(graph.weight[:, s, p].max())
        for s in range(virtual_microbatches) for p in range(ranks)
    ) + sum(ticks(h) * 2 * ranks for h in graph.transfer)  # fmt: skip
    end = model.new_int_var(0, horizon, "end")
    start: dict[tuple[str, int, int], cp_model.IntVar] = {}
    finish: dict[tuple[str, int, int], cp_model.IntVar] = {}
    for p in range(ranks):
        machine, held, demand = [], [], []

        def operation(kind: str, s: int, p: int, lengths: list[tuple[cp_model.IntVar, int]]) -> None:
            begin = model.new_int_var(0, horizon, f"{kind}{s}@{p}")
            stop = model.new_int_var(0, horizon, f"{kind}{s}@{p}.")
            for chosen, length in lengths:
                machine.append(model.new_optional_interval_var(begin, length, stop, chosen, ""))  # noqa: B023
            model.add(stop <= end)
            start[kind, s, p], finish[kind, s, p] = begin, stop

        def keep(begin: cp_model.IntVar, stop: cp_model.IntVar, chosen: cp_model.IntVar, size: float) -> None:
            length = model.new_int_var(0, horizon, "")
            held.append(model.new_optional_interval_var(begin, length, stop, chosen, ""))  # noqa: B023
            demand.append(int(size))  # noqa: B023

        for s in range(virtual_microbatches):
            pick = [model.new_bool_var("") for _ in range(count)]
            model.add_exactly_one(pick)
            operation("F", s, p, [(pick[c], ticks(graph.forward[c, s, p])) for c in range(count)])
            if not graph.has_backward[s, p]:
                for c in range(count):
                    keep(start["F", s, p], finish["F", s, p], pick[c], graph.activation[c, s, p])
                continue
            modes = []
            for c in range(count):
                fused, apart = model.new_bool_var(""), model.new_bool_var("")
                model.add(fused + apart == pick[c])
                if not graph.has_weight[s, p]:
                    model.add(fused == 0)
                elif not split:
                    model.add(apart == 0)
                modes.append((c, fused, apart))
            operation(
                "B", s, p,
                [(f, ticks(graph.fused[c, s, p])) for c, f, _ in modes]
                + [(a, ticks(graph.backward[c, s, p])) for c, _, a in modes],
            )  # fmt: skip
            for c, _, _ in modes:
                keep(start["F", s, p], finish["B", s, p], pick[c], graph.activation[c, s, p])
            if graph.has_weight[s, p]:
                operation("W", s, p, [(a, ticks(graph.weight[c, s, p])) for c, _, a in modes])
                model.add(start["W", s, p] >= finish["B", s, p])
                for c, _, a in modes:
                    keep(finish["B", s, p], finish["W", s, p], a, graph.deferred_activation[c, s, p])
        model.add_no_overlap(machine)
        if np.isfinite(graph.memory_limit[p]):
            model.add_cumulative(held, demand, int(graph.memory_limit[p] - graph.static_bytes[p]))
    for s in range(virtual_microbatches):
        step = -1 if graph.is_reversed[s] else 1
        alone = graph.units[int(graph.unit_of[s])].rank  # where a replicated module's unit runs, from no other rank
        for p in range(ranks) if alone is None else (alone,):
            if p != graph.entry_rank(s):
                model.add(start["F", s, p] >= finish["F", s, p - step] + ticks(graph.transfer[s]))
            else:
                for q in graph.previous_virtual_microbatches[s]:
                    model.add(start["F", s, p] >= finish["F", q, graph.exit_rank(q)] + ticks(graph.link_transfer(q, s)))
            if not graph.has_backward[s, p]:
                continue
            model.add(start["B", s, p] >= finish["F", s, p])
            if p != graph.exit_rank(s):
                model.add(start["B", s, p] >= finish["B", s, p + step] + ticks(graph.transfer[s]))
            else:
                for n in graph.next_virtual_microbatches[s]:
                    model.add(
                        start["B", s, p] >= finish["B", n, graph.entry_rank(n)] + ticks(graph.link_transfer(s, n))
                    )
    model.minimize(end)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = workers
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return Optimum(np.inf, np.inf, True, False)
    known = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return Optimum(
        solver.objective_value / TICKS if known else np.inf, solver.best_objective_bound / TICKS,
        status == cp_model.OPTIMAL, True,
    )  # fmt: skip
