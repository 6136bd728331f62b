"""How fast plans get good, and how that scales with microbatches, beside an exact solver."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from dip_megatron.core import OperationGraph
from dip_megatron.describe.cost import priced_graph
from dip_megatron.schedulers.dip.engine import search, warm_up
from dip_megatron.schedulers.dip.options import SearchResult

from . import draw, quoted
from .cases import Budget, describe, load_case, mix_of, papers_partition
from .exact import Solved, solve_orders
from .record import Bar, Comparison, Result, Table

MODEL, SMALL, CLUSTER = "vlm-l", "vlm-s", "h800"
NEAR = 0.02
"""Within this share of the best of the longest search counts as near it."""
TICK = 1e-3  # seconds: durations of the instances that are solved exactly


def run(budget: Budget, out: Path) -> Result:
    """Progress of both searches on VLM-L; VLM-S with few to many microbatches under search and CP-SAT."""
    warm_up()
    setting = load_case(MODEL, CLUSTER, 1, budget.microbatches)
    partition = papers_partition(setting)
    graph = priced_graph(setting.pricer, partition, setting.microbatches[0], setting.memory_limit)
    progress = {s: search(graph, schedule=s, budget_seconds=budget.progress, workers=budget.workers)
                for s in ("dip", "dip-paper")}  # fmt: skip
    near = {s: seconds_to_near(r) for s, r in progress.items()}
    scales = [_scale(count, budget) for count in budget.scales]
    large = _near_at(max(budget.scales), budget)
    return Result(
        title="Search: progress over time, and scalability",
        setting=f"Simulated plans, measured search seconds ({budget.workers} thread; the paper: 64 cores). Progress: "
        f"{describe(setting, mix_of(MODEL))} Scalability: VLM-S, one memory strategy and fused backwards, so "
        f"that CP-SAT "
        f"(OR-tools, in place of Z3 and Gurobi; {budget.solver:g} s an instance) has orders alone to find.",
        tables=[
            Table(f"Seconds of search until within {NEAR:.0%} of the best of {budget.progress:g} s",
                  ["schedule", "seconds (measured)", "first plan s (measured)", "first s (simulated)", "best s "
                  "(simulated)",
                   "best over bound"],
                  [[s, f"{near[s]:.2f}", f"{r.history[0][0]:.3f}", f"{r.history[0][1]:.3f}", f"{r.iteration_time:.3f}",
                    f"{r.iteration_time / r.lower_bound:.3f}"] for s, r in progress.items()]),
            Table("Microbatches of VLM-S against an exact solver",
                  ["microbatches", "operations", f"search {budget.search:g} s (simulated)", "CP-SAT (simulated)",
                   "CP-SAT's bound", "proved", "CP-SAT took s (measured)"], [s.row() for s in scales]),
        ],
        data={
            "measured": {"seconds_to_near": near, "solver_seconds": {s.microbatches: s.solved.seconds for s in scales},
                         "seconds_to_near_by_microbatches": {str(max(budget.scales)): large}},
            "simulated": {
                "progress": {s: [list(point) for point in r.history] for s, r in progress.items()},
                "bound": {s: r.lower_bound for s, r in progress.items()},
                "scale": {s.microbatches: {"search": s.found, "solver": s.solved.time, "solver_bound": s.solved.bound,
                                           "optimal": s.solved.optimal} for s in scales},
            },
            "quoted": {"search_seconds": quoted.SEARCH_SECONDS},
        },
        comparisons=_optimal(scales),
        bars=[Bar(f"{MODEL}: seconds of dip-paper's search until near its best", near["dip-paper"],
                  quoted.SEARCH_SECONDS, at_most=True, why=f"{budget.workers} thread here, 64 cores in the paper"),
              Bar(f"{MODEL}: seconds of dip's search until near its best", near["dip"], quoted.SEARCH_SECONDS,
                  at_most=True, why="not explained: one thread here, 64 cores in the paper"),
              Bar(f"{SMALL}, {max(budget.scales)} microbatches: seconds of dip's search until near its best", large,
                  quoted.SEARCH_SECONDS, at_most=True, why="not explained: one thread here, 64 cores in the paper")],
        figure=draw.panels(
            out / "search.png",
            [({s: _curve(r) for s, r in progress.items()}, "seconds of search (measured)",
              "time over lower bound (simulated)", "x"),
             ({"search": [(s.microbatches, s.found / s.floor) for s in scales],
               f"CP-SAT, {budget.solver:g} s": [(s.microbatches, s.solved.time / s.floor) for s in scales
                                                if s.solved.found]},
              "microbatches", "time over the better bound (simulated)", "x")],
            "Search progress (VLM-L) and scalability (VLM-S)"),
    )  # fmt: skip


def _curve(result: SearchResult) -> list[tuple[float, float]]:
    """(seconds of search, time over lower bound) of each improvement, and of the end."""
    points = [*result.history, (result.seconds, result.iteration_time)]
    return [(max(t, 1e-3), y / result.lower_bound) for t, y in points]


def seconds_to_near(result: SearchResult) -> float:
    """Seconds until a schedule within NEAR of the last one was found."""
    return next(t for t, y in result.history if y <= result.iteration_time * (1 + NEAR))


def _near_at(microbatches: int, budget: Budget) -> float:
    setting = load_case(SMALL, CLUSTER, 1, microbatches)
    graph = priced_graph(setting.pricer, papers_partition(setting), setting.microbatches[0], setting.memory_limit)
    return seconds_to_near(search(graph, budget_seconds=budget.progress, workers=budget.workers))


class _Scale:
    """One number of microbatches: our search and the solver on the same graph."""

    def __init__(self, microbatches: int, graph: OperationGraph, found: SearchResult, solved: Solved) -> None:
        self.microbatches, self.found, self.solved = microbatches, found.iteration_time, solved
        self.floor = max(found.lower_bound, solved.bound)
        self.operations = 2 * graph.virtual_microbatches * graph.ranks

    def row(self) -> list[str]:
        time_ = f"{self.solved.time:.3f}" if self.solved.found else "none found"
        return [str(self.microbatches), str(self.operations), f"{self.found:.3f}", time_, f"{self.solved.bound:.3f}",
                "yes" if self.solved.optimal else "no", f"{self.solved.seconds:.1f}"]  # fmt: skip


def _scale(microbatches: int, budget: Budget) -> _Scale:
    setting = load_case(SMALL, CLUSTER, 1, microbatches)
    graph = priced_graph(setting.pricer, papers_partition(setting), setting.microbatches[0], 1e15)
    graph = in_ticks(graph.project(np.zeros((graph.virtual_microbatches, graph.ranks), dtype=np.int8)))
    found = search(graph, schedule="dip-paper", budget_seconds=budget.search, workers=budget.workers)
    start = time.perf_counter()
    solved = solve_orders(graph, TICK, budget.solver)
    return _Scale(microbatches, graph, found, replace(solved, seconds=time.perf_counter() - start))


def in_ticks(graph: OperationGraph) -> OperationGraph:
    """The graph with durations rounded up to whole ticks, for both search and solver."""

    def rounded(array):  # type: ignore[no-untyped-def]
        return np.ceil(array / TICK - 1e-9) * TICK

    changed = {name: rounded(getattr(graph, name)) for name in ("forward", "backward", "weight", "fused", "transfer")}
    return replace(graph, **changed)


def _optimal(scales: list[_Scale]) -> list[Comparison]:
    proved = [s for s in scales if s.solved.optimal]
    return [Comparison(f"{s.microbatches} microbatches: search over the optimum", 1.0, s.found / s.solved.time,
                       "the tree search stops short of the optimum; `dip`'s local search is measured in "
                       "scripts/bench", "x")
            for s in proved]  # fmt: skip
