"""Tables on the schedule search: quality over time, distance to proven optima, tight memory, noise, kernel speed.

    benchmarks/search.py [gap] [optimum] [tight] [noise] [speed] [scale] [--seconds S] [--workers N] [--count N]

Without names all are run, which takes about a quarter of an hour on two cores. Graphs are those of ``tests/graphs.py``:
the sizes of the paper's models with drawn batches, and small drawn instances.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dip_megatron.core import OperationGraph, check_complete
from dip_megatron.core.bounds import lower_bound
from dip_megatron.core.simulate import graph_arrays, simulate, simulate_compiled
from dip_megatron.core.simulate.kernels import pad_orders, replay
from dip_megatron.schedulers.dip.annealing import MAY, anneal
from dip_megatron.schedulers.dip.engine import search, warm_up
from dip_megatron.schedulers.dip.feasibility import DoesNotFitError
from dip_megatron.schedulers.dip.keys import copy_keys, make_keys
from dip_megatron.schedulers.dip.memory import make_refill
from dip_megatron.schedulers.dip.options import SearchResult
from dip_megatron.schedulers.dip.problem import make_problem
from dip_megatron.schedulers.dip.random import seeded
from dip_megatron.schedulers.dip.work import make_work
from tests.graphs import PAPER_MODELS, paper_graph, random_graph

SOLVED_QUICKLY = (8, 11, 22, 24, 25, 29, 32, 34, 36, 42, 43, 44, 47, 48, 54, 59, 65, 70, 71, 83, 85, 86, 92, 94, 102)
TABLES = ("gap", "optimum", "tight", "noise", "speed", "scale")


def table(title: str, head: list[str], rows: list[list[object]]) -> None:
    """Print aligned columns."""
    text = [head, *([f"{x:.4f}" if isinstance(x, float) else str(x) for x in row] for row in rows)]
    widths = [max(len(row[i]) for row in text) for i in range(len(head))]
    print(f"\n{title}")
    for row in text:
        print("  " + "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)))
    sys.stdout.flush()


def gap(budgets: tuple[float, ...], workers: int, seeds: int = 2) -> None:
    """Time over lower bound after each budget, and dip-paper's over dip's."""
    numbers = []
    for name in PAPER_MODELS:
        graphs = [paper_graph(name, seed) for seed in range(seeds)]
        row = []
        for budget in budgets:
            ours = [search(g, budget_seconds=budget, workers=workers) for g in graphs]
            theirs = [search(g, schedule="dip-paper", budget_seconds=budget, workers=workers) for g in graphs]
            row.append(float(np.mean([r.iteration_time / r.lower_bound for r in ours])))
            row.append(float(np.mean([b.iteration_time / a.iteration_time for a, b in zip(ours, theirs, strict=True)])))
        numbers.append(row)
    rows: list[list[object]] = [[name, *row] for name, row in zip(PAPER_MODELS, numbers, strict=True)]
    rows.append(["mean", *np.mean(numbers, axis=0).tolist()])
    head = ["model", *(x for b in budgets for x in (f"gap {b:g} s", f"dip-paper/dip {b:g} s"))]
    table(f"Time over lower bound, {workers} worker(s), {seeds} drawn batches of 16 microbatches", head, rows)


def optimum(count: int, seconds: float = 20.0) -> tuple[float, float]:
    """Distance of one second of search to CP-SAT's proven optimum: mean and greatest time over the optimum."""
    from tests.schedulers.dip.cpsat import solve

    gaps, bounds, skipped, limited = [], [], 0, 0
    for seed in (*SOLVED_QUICKLY, *range(103, 100_000)):
        graph = random_graph(seed, ranks=2 + seed % 2, microbatches=3, max_units=2, integer=True)
        if graph.virtual_microbatches * graph.ranks > 24:
            continue
        best = solve(graph, seconds=seconds, workers=2)
        if not best.optimal:
            skipped += 1
            continue
        gaps.append(search(graph, budget_seconds=1.0).iteration_time / best.time)
        bounds.append(best.time / lower_bound(graph))
        limited += bool(np.isfinite(graph.memory_limit).any())
        if len(gaps) == count:
            break
    table(
        f"{count} instances solved to optimality ({limited} with a memory limit; {skipped} not in {seconds:g} s)",
        ["search/optimum mean", "max", "optimum/bound mean", "max"],
        [[float(np.mean(gaps)), float(np.max(gaps)), float(np.mean(bounds)), float(np.max(bounds))]],
    )
    return float(np.mean(gaps)), float(np.max(gaps))


def tight(count: int) -> Counter[str]:
    """Draw ``count`` instances at or near the smallest memory they need, every twentieth just under it; what became of
    them. A plan counts as valid if it is complete, ends, fits, and is no faster than the bound."""
    outcome: Counter[str] = Counter()
    for seed in range(count):
        memory = 0.98 if seed % 20 == 0 else (1.0, 1.001, 1.05, 1.2)[seed % 4]
        graph = random_graph(10**6 + seed, microbatches=2 + seed % 7, memory=memory)
        try:
            result = search(graph, budget_seconds=60, evaluations=2, seed=seed)
        except DoesNotFitError:
            outcome["proved that nothing fits"] += 1
            continue
        timeline = simulate_compiled(graph, result.schedule)
        valid = check_complete(graph, result.schedule) is None and timeline.iteration_time >= result.lower_bound
        outcome["valid plan" if valid and np.all(timeline.peak_bytes <= graph.memory_limit) else "INVALID PLAN"] += 1
    table(f"{count} instances at or near the smallest memory", ["outcome", "count"], [list(x) for x in outcome.items()])
    return outcome


def executed_over_planned(graph: OperationGraph, result: SearchResult, draws: int, share: float) -> list[float]:
    """How much longer a plan takes where every operation takes up to ``share`` more or less, its order unchanged."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        changed = {
            kind: getattr(graph, kind) * random.uniform(1 - share, 1 + share, graph.forward.shape)
            for kind in ("forward", "backward", "weight", "fused")
        }
        executed = simulate_compiled(dataclasses.replace(graph, **changed), result.schedule).iteration_time
        found.append(executed / result.iteration_time)
    return found


def noise(draws: int = 100, share: float = 0.1) -> None:
    """Executed over planned time when every operation takes up to 10% more or less than planned."""
    numbers = []
    for name in PAPER_MODELS:
        graph = paper_graph(name)
        result = search(graph, budget_seconds=2.0)
        losses = executed_over_planned(graph, result, draws, share)
        numbers.append([float(np.mean(losses)), float(np.quantile(losses, 0.95))])
    rows: list[list[object]] = [[name, *row] for name, row in zip(PAPER_MODELS, numbers, strict=True)]
    rows.append(["mean", *np.mean(numbers, axis=0).tolist()])
    table("Executed over planned time, +-10% per operation", ["model", "mean", "95th percentile"], rows)


def microseconds(action: Callable[[], object], repeats: int) -> float:
    """Median over 20 rounds of ``repeats`` calls."""
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(repeats):
            action()
        times.append((time.perf_counter() - start) / repeats)
    return round(float(np.median(times)) * 1e6, 1)


def speed() -> None:
    """Microseconds of a simulation and of one step of annealing."""
    rows: list[list[object]] = []
    for name in PAPER_MODELS:
        graph = paper_graph(name)
        schedule = search(graph, budget_seconds=0.2).schedule
        g = graph_arrays(graph)
        orders, lengths = pad_orders(schedule)
        nodes = g.virtual_microbatches * g.ranks
        inputs = (
            g, orders, lengths, schedule.strategy.reshape(-1), np.zeros(orders.shape), np.zeros(orders.shape),
            np.zeros(g.ranks, dtype=np.int32), np.zeros(nodes), np.zeros(nodes),
        )  # fmt: skip
        q = make_problem(graph)
        walk: Sequence[Any] = (
            q, *(copy_keys(make_keys(q, split=True)) for _ in range(3)), make_work(q), make_refill(q),
            np.ones(MAY, dtype=bool), seeded(0, 0), np.array([1e9, 1e9]), 1e9, 50,
        )  # fmt: skip
        start = time.perf_counter()
        slow = simulate(graph, schedule)
        reference = round((time.perf_counter() - start) * 1e6)
        assert slow.iteration_time == replay(*inputs)

        def simulated(inputs: Any = inputs) -> float:
            return replay(*inputs)

        def whole(graph=graph, schedule=schedule, g=g) -> object:
            return simulate_compiled(graph, schedule, g)

        def walked(walk: Sequence[Any] = walk) -> None:
            anneal(*walk)

        step = round(microseconds(walked, 1) / 50, 1)
        rows.append([name, int(lengths.sum()), microseconds(simulated, 20), microseconds(whole, 20), reference, step])
    head = ["model", "operations", "replay us", "simulate_compiled us", "reference us", "annealing step us"]
    table("Kernel speed on one core", head, rows)


def scale(workers: int) -> None:
    """64 microbatches on 16 ranks: 5 seconds of search over 30."""
    graph = paper_graph("vlm-l", ranks=16, microbatches=64)
    times = [search(graph, budget_seconds=s, workers=workers).iteration_time for s in (5.0, 30.0)]
    bound = lower_bound(graph)
    table(
        "64 microbatches on 16 ranks",
        ["gap 5 s", "gap 30 s", "5 s over 30 s"],
        [[times[0] / bound, times[1] / bound, times[0] / times[1]]],
    )


def main() -> None:
    """Run the tables named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--seconds", type=float, default=5.0, help="largest budget of the gap table")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, help="instances for optimum (30) and tight (10000)")
    arguments = parser.parse_args()
    unknown = [t for t in arguments.tables if t not in TABLES]
    if unknown:
        parser.error(f"unknown table {unknown[0]!r}; choose from {', '.join(TABLES)}")
    warm_up()
    runs: dict[str, Callable[[], object]] = {
        "gap": lambda: gap((*(b for b in (0.1, 1.0) if b < arguments.seconds), arguments.seconds), arguments.workers),
        "optimum": lambda: optimum(arguments.count or 30),
        "tight": lambda: tight(arguments.count or 10_000),
        "noise": noise,
        "speed": speed,
        "scale": lambda: scale(arguments.workers),
    }
    for name in arguments.tables or TABLES:
        runs[name]()


if __name__ == "__main__":
    main()
