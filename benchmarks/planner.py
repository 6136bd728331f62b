"""The planner against its bars: plan quality, baselines, latency, robustness, memory, kernels.

    scripts/bench planner [--quick] [--models vlm-s,...] [--skip PART,...] [--json FILE]

Models, cluster and workload mixes are those that ship with the package; ratios come from one run on one machine. The
whole takes about half an hour on two cores, ``--quick`` (fewer models, budgets and instances) a few minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.search import executed_over_planned, microseconds, optimum, tight
from dip_megatron.core import OperationGraph, Plan, Schedule
from dip_megatron.core.lower import make_plan
from dip_megatron.core.simulate import graph_arrays, simulate, simulate_compiled
from dip_megatron.core.simulate.kernels import pad_orders, replay
from dip_megatron.core.verify import verify
from dip_megatron.describe.cost import load_cluster, priced_graph
from dip_megatron.describe.model import Partition, load_model
from dip_megatron.describe.workload import load_workload
from dip_megatron.families.shared.shapes import LlavaShapes
from dip_megatron.planner.facade import (
    DoesNotFitError,
    Effort,
    Setting,
    live_maker,
    make_planner,
    searched_partition,
)  # fmt: skip
from dip_megatron.planner.model_graphs import ModelGraphs
from dip_megatron.planner.partitioning import paper_partition
from dip_megatron.planner.request import PlanRequest
from dip_megatron.planner.service import AT_CALL_SECONDS, PlannerService
from dip_megatron.report.schedules import text_table
from dip_megatron.schedulers.common import BaselineError
from dip_megatron.schedulers.dip.engine import search, warm_up
from dip_megatron.schedulers.dip.options import SearchResult
from dip_megatron.schedulers.registry import find_schedule, schedule_names

MODELS = ("vlm-s", "vlm-m", "vlm-l", "t2v-s", "t2v-l")
PARTS = ("quality", "baselines", "latency", "noise", "kernels", "scale", "tight", "optimum", "call")


@dataclass(frozen=True)
class Bar:
    """One bar: a measured number and what it must be."""

    name: str
    measured: float
    target: float
    at_most: bool = True
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.measured <= self.target if self.at_most else self.measured >= self.target

    def row(self) -> list[str]:
        sign = "<=" if self.at_most else ">="
        return [self.name, f"{self.measured:.4g}{self.unit}", f"{sign} {self.target:g}{self.unit}",
                "met" if self.met else "MISSED"]  # fmt: skip


@dataclass(eq=False)
class Case:
    """One model with its batches, our partition and the paper's, and their graphs."""

    name: str
    setting: Setting
    ours: Partition
    paper: Partition
    graphs: list[OperationGraph] = field(default_factory=list)
    paper_graphs: list[OperationGraph] = field(default_factory=list)
    best: list[SearchResult] = field(default_factory=list)


def make_case(name: str, batches: int, microbatches: int, partition_seconds: float, pp: int | None = None) -> Case:
    """Draw the batches and cut the model, both ways."""
    model = load_model(name).with_parallel(pp=pp)
    mix = "t2v-mix" if name.startswith("t2v") else "vlm-mix"
    measured, earlier = (load_workload(mix, model, batches, microbatches, seed) for seed in (0, 1))
    setting = Setting(model, load_cluster("h100"), measured, earlier=earlier)
    paper = paper_partition(model, setting.cluster, setting.known)
    case = Case(name, setting, searched_partition(setting, partition_seconds) if partition_seconds else paper, paper)
    for microbatch_list in setting.microbatches:
        case.graphs.append(priced_graph(setting.pricer, case.ours, microbatch_list))
        case.paper_graphs.append(priced_graph(setting.paper_pricer, case.paper, microbatch_list))
    return case


def mean_over(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return float(np.mean(values))


def quality(cases: Sequence[Case], budgets: Sequence[float], workers: int) -> list[Bar]:
    """Time over the lower bound, and dip-paper's time over dip's at the same budget: as a whole, each on its own
    partition, and the search alone, both on ours."""
    rows = []
    gaps: dict[float, list[float]] = {b: [] for b in budgets}
    wholes: dict[float, list[float]] = {b: [] for b in budgets}
    for case in cases:
        for budget in budgets:
            ours = [search(g, budget_seconds=budget, workers=workers) for g in case.graphs]
            same = [search(g, schedule="dip-paper", budget_seconds=budget, workers=workers) for g in case.graphs]
            whole = [search(g, schedule="dip-paper", budget_seconds=budget, workers=workers) for g in case.paper_graphs]
            case.best = ours
            gap = mean_over([r.iteration_time / r.lower_bound for r in ours])
            ratio = mean_over([b.iteration_time / a.iteration_time for a, b in zip(ours, whole, strict=True)])
            alone = mean_over([b.iteration_time / a.iteration_time for a, b in zip(ours, same, strict=True)])
            gaps[budget].append(gap)
            wholes[budget].append(ratio)
            spent = mean_over([r.seconds for r in (*same, *whole)])
            rows.append(
                [case.name, f"{budget:g}", f"{mean_over([r.iteration_time for r in ours]):.4f}", f"{gap:.4f}",
                 f"{mean_over([r.iteration_time / r.lower_bound for r in same]):.4f}", f"{alone:.3f}", f"{ratio:.3f}",
                 f"{mean_over([r.seconds for r in ours]):.2f}", f"{spent:.2f}"]
            )  # fmt: skip
    head = ["model", "budget s", "dip seconds", "dip / bound", "paper's search / bound", "search alone",
            "dip-paper / dip", "dip took s", "dip-paper took s"]  # fmt: skip
    show("Quality over time", head, rows)
    longest, shortest = budgets[-1], budgets[0]
    return [
        Bar(f"plan time over bound at {longest:g} s, mean", mean_over(gaps[longest]), 1.025),
        Bar(f"plan time over bound at {longest:g} s, worst model", max(gaps[longest]), 1.04),
        Bar(f"plan time over bound at {shortest:g} s, mean", mean_over(gaps[shortest]), 1.05),
        *(Bar(f"dip-paper / dip at {b:g} s, worst model", min(wholes[b]), 1.08, False) for b in budgets),
    ]


def baselines(cases: Sequence[Case], budget: float, workers: int) -> list[Bar]:
    """Every schedule on the same batches, as ``dip compare`` has it; partitions and static plans are chosen on batches
    drawn before. Last, what no schedule can be faster than: the least work of all stages, spread evenly over ranks."""
    bars, rows, limits = [], [], []
    for case in cases:
        effort = Effort(budget, workers)
        times: dict[str, float] = {}
        work = mean_over([float((g.forward + g.fused).min(axis=0).sum()) / g.ranks for g in case.graphs])
        for name in schedule_names():
            try:
                planner = make_planner(name, case.setting, effort, searched=case.ours)
                found = [planner(m) for m in case.setting.microbatches]
            except (BaselineError, DoesNotFitError) as error:
                rows.append([case.name, name, "-", "-", "-", "-", "-", str(error)[:30]])
                continue
            time_ = mean_over([p.iteration_time for p in found])
            if all(p.fits for p in found):
                times[name] = time_
            rows.append(
                [case.name, name, f"{time_:.4f}", f"{time_ / times['dip']:.3f}" if "dip" in times else "-",
                 f"{mean_over([p.iteration_time / p.lower_bound for p in found]):.3f}",
                 f"{mean_over([p.bubble_ratio for p in found]):.1%}",
                 f"{max(max(p.peak_bytes) for p in found) / 1e9:.1f}" + ("" if name in times else " over"),
                 f"{mean_over([p.recompute_fraction for p in found]):.1%}"]
            )  # fmt: skip
        rows.append(
            [case.name, "(least work)", f"{work:.4f}", f"{work / times['dip']:.3f}", "", "0.0%", "", "0.0%"]
        )  # fmt: skip
        if case.name.startswith("vlm"):
            static = times["megatron-interleaved"]
            bars.append(Bar(f"best static Megatron / dip, {case.name}", static / times["dip"], 1.5, False))
        for name in ("megatron-interleaved", "dip-paper"):
            if name in times:
                limits.append([case.name, name, f"{times[name] / times['dip']:.3f}", f"{times[name] / work:.3f}"])
        rows.append([""] * 8)
    head = ["model", "schedule", "seconds", "x dip", "over bound", "bubble", "peak GB", "recompute"]
    show(f"Schedules, {budget:g} s of search", head, rows[:-1])
    show("How much faster dip is, and how much faster any schedule of the model could be",
         ["model", "than", "dip", "at most"], limits)  # fmt: skip
    return bars


def latency(cases: Sequence[Case]) -> list[Bar]:
    """Seconds from a batch to the first plan in a warm process: priced, scheduled, lowered, verified and pickled."""
    rows, worst = [], np.zeros(4)
    for case in cases:
        steps = []
        for _ in range(5):
            for microbatches in case.setting.microbatches:
                steps.append(first_plan(case, microbatches))
        medians = np.median(np.array(steps), axis=0)
        worst = np.maximum(worst, medians)
        rows.append([case.name, *(f"{1e3 * m:.1f}" for m in medians)])
    head = ["model", "batch priced ms", "first schedule ms", "lowered ms", "verified and pickled ms"]
    show("First plan in a warm process, median since the batch arrived", head, rows)
    return [
        Bar("first schedule after the batch, worst model", float(worst[1]), 0.1, unit=" s"),
        Bar("first lowered and verified plan after the batch, worst model", float(worst[3]), 0.1, unit=" s"),
    ]


def at_the_call(names: Sequence[str], batches: int) -> list[Bar]:
    """Seconds from a batch to its plan where a loop shows it only when it is to run, on 8 ranks: made and pickled on
    the rank that plans, then read and hashed on the others; of a batch that comes again; and by the greedy, as while
    the kernels are being compiled after an installation."""
    rows, worst = [], np.zeros(4)
    for name in names:
        case = make_case(name, batches, 16, 3.0, pp=8)
        setting = case.setting
        maker = live_maker(
            find_schedule("dip"), ModelGraphs(setting.model, setting.cluster, case.ours),
            LlavaShapes(576, 1024, 576, 4096, 1, 1, "bfloat16"), Effort(),
        )  # fmt: skip
        service = PlannerService(maker, 1, improve_seconds=1.0)
        numbers = itertools.count(1)
        mix = "t2v-mix" if name.startswith("t2v") else "vlm-mix"

        def planned(
            loads: Sequence[object], service: PlannerService = service, numbers: Iterator[int] = numbers
        ) -> tuple[float, float, Plan]:
            start, number = time.perf_counter(), next(numbers)
            deadline = time.monotonic() + 0.8 * AT_CALL_SECONDS
            service.submit(PlanRequest(number, (tuple(loads),), AT_CALL_SECONDS, deadline=deadline))  # type: ignore[arg-type]
            data = pickle.dumps(service.take(number, 0.0).plans[0])
            made = time.perf_counter() - start
            plan = pickle.loads(data)
            plan.digest()
            return made, time.perf_counter() - start, plan

        while planned(load_workload(mix, setting.model, 1, 1, next(numbers))[0].microbatches)[2].name != "dip":
            time.sleep(0.5)  # until the kernels are loaded
        seconds: list[list[float]] = [[], [], [], []]
        over = []
        for loads in setting.microbatches:
            made, held, plan = planned(loads)
            seconds[0].append(made)
            seconds[1].append(held)
            over.append(plan.predicted.iteration_time / plan.predicted.lower_bound)
            seconds[2].append(planned(loads)[1])
            start = time.perf_counter()
            pickle.dumps(maker.quick(PlanRequest(0, (tuple(loads),), 0.0)))
            seconds[3].append(time.perf_counter() - start)
        service.close()
        medians = np.median(np.array(seconds), axis=1)
        worst = np.maximum(worst, medians)
        rows.append([name, *(f"{1e3 * m:.1f}" for m in medians), f"{mean_over(over):.3f}"])
    head = ["model", "pickled ms", "held by all ms", "again ms", "greedy ms", "time over bound"]
    show("Plan at the call, 16 microbatches on 8 ranks, median since the batch was there", head, rows)
    return [Bar("plan at the call, worst model", float(worst[1]), 0.05, unit=" s")]


class _FirstFound(Exception):
    """Ends a search at its first schedule."""


def first_plan(case: Case, microbatches: Sequence[object]) -> list[float]:
    """Seconds until each step of the first plan is done."""
    start = time.perf_counter()
    graph = priced_graph(case.setting.pricer, case.ours, microbatches)  # type: ignore[arg-type]
    marks = [time.perf_counter() - start]
    first: list[Schedule] = []

    def stop(schedule: Schedule, _: float) -> None:
        first.append(schedule)
        raise _FirstFound

    with contextlib.suppress(_FirstFound):
        search(graph, budget_seconds=1.0, on_improved=stop)
    marks.append(time.perf_counter() - start)
    plan = make_plan(graph, first[0], lower_bound=0.0)
    marks.append(time.perf_counter() - start)
    verify(plan)
    pickle.dumps(plan)
    marks.append(time.perf_counter() - start)
    return marks


def noise(cases: Sequence[Case], draws: int, share: float = 0.1) -> list[Bar]:
    """Executed over planned time where every operation takes up to 10% more or less, its order unchanged."""
    rows, losses = [], []
    for case in cases:
        graph = case.graphs[0]
        result = case.best[0] if case.best else search(graph, budget_seconds=1.0)
        ratios = executed_over_planned(graph, result, draws, share)
        losses.append(mean_over(ratios))
        rows.append([case.name, f"{losses[-1]:.4f}", f"{np.quantile(ratios, 0.95):.4f}"])
    show("Executed over planned time, +-10% per operation", ["model", "mean", "95th percentile"], rows)
    return [Bar("executed over planned time with 10% noise, mean", mean_over(losses), 1.03)]


def kernels(cases: Sequence[Case]) -> list[Bar]:
    """One simulation of a plan, compiled and plain; both must agree to the last bit."""
    rows, bars = [], []
    for case in cases:
        graph = case.graphs[0]
        schedule = (case.best[0] if case.best else search(graph, budget_seconds=0.2)).schedule
        arrays = graph_arrays(graph)
        orders, lengths = pad_orders(schedule)
        nodes = arrays.virtual_microbatches * arrays.ranks
        inputs = (
            arrays, orders, lengths, np.ascontiguousarray(schedule.strategy.reshape(-1)), np.zeros(orders.shape),
            np.zeros(orders.shape), np.zeros(arrays.ranks, dtype=np.int32), np.zeros(nodes), np.zeros(nodes),
        )  # fmt: skip
        kernel = microseconds(partial(replay, *inputs), 20)
        whole = microseconds(partial(simulate_compiled, graph, schedule, arrays), 20)
        start = time.perf_counter()
        plain = simulate(graph, schedule)
        reference = 1e6 * (time.perf_counter() - start)
        exact = plain.iteration_time == simulate_compiled(graph, schedule, arrays).iteration_time
        rows.append([case.name, str(int(lengths.sum())), f"{kernel:.1f}", f"{whole:.1f}", f"{reference:.0f}",
                     "yes" if exact else "NO"])  # fmt: skip
        if case.name == "vlm-s":
            bars.append(Bar("simulating a VLM-S plan", whole / 1e3, 1.0, unit=" ms"))
        bars.append(Bar(f"compiled equals plain simulation, {case.name} (1: yes)", float(exact), 1.0, False))
    head = ["model", "operations", "kernel us", "with memory us", "plain Python us", "equal"]
    show("Simulation of one plan on one core", head, rows)
    return bars


def scale(budgets: tuple[float, float], workers: int) -> list[Bar]:
    """64 microbatches on 16 pipeline ranks: what more time would find."""
    case = make_case("vlm-l", 1, 64, 0.0, pp=16)
    graph = case.graphs[0]
    short, long = (search(graph, budget_seconds=b, workers=workers) for b in budgets)
    rows = [[f"{b:g}", f"{r.iteration_time:.4f}", f"{r.iteration_time / r.lower_bound:.4f}", f"{r.seconds:.1f}"]
            for b, r in zip(budgets, (short, long), strict=True)]  # fmt: skip
    show("VLM-L, 64 microbatches on 16 ranks", ["budget s", "seconds", "over bound", "took s"], rows)
    return [Bar(f"64 microbatches on PP16: {budgets[0]:g} s over {budgets[1]:g} s",
                short.iteration_time / long.iteration_time, 1.02)]  # fmt: skip


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a titled table."""
    print(f"\n{title}\n{text_table(head, rows)}", flush=True)


def main() -> int:
    """Run the parts, print their tables and then all bars; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes: two models, one batch, fewer instances")
    parser.add_argument("--models", help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--skip", default="", help=f"comma-separated parts to leave out: {', '.join(PARTS)}")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="save the bars")
    arguments = parser.parse_args()
    quick = arguments.quick
    names = arguments.models.split(",") if arguments.models else ["vlm-s", "t2v-s"] if quick else list(MODELS)
    skipped = set(filter(None, arguments.skip.split(",")))
    for given, known in ((names, MODELS), (skipped, PARTS)):
        for name in given:
            if name not in known:
                parser.error(f"unknown {name!r}; choose from {', '.join(known)}")
    workers = arguments.workers
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, {workers} search threads, load before the run {load:.1f}")
    warm_up()
    cases = []
    if not set(PARTS[:5]) <= skipped:
        for name in names:
            cases.append(make_case(name, 1 if quick else 2, 16, 10.0 if quick else 40.0))
            for module in cases[-1].ours.modules:
                print(
                    f"{name} {module.module}: {module.segments} segments of {module.unit_size or 'whole microbatches'}"
                )
    budgets = (0.1, 1.0) if quick else (0.1, 1.0, 5.0)
    parts = {
        "quality": lambda: quality(cases, budgets, workers),
        "baselines": lambda: baselines(cases, budgets[-1], workers),
        "latency": lambda: latency(cases),
        "call": lambda: at_the_call(names, 4 if quick else 12),
        "noise": lambda: noise(cases, 20 if quick else 100),
        "kernels": lambda: kernels(cases),
        "scale": lambda: scale((2.0, 6.0) if quick else (5.0, 30.0), workers),
        "tight": lambda: [invalid(300 if quick else 10_000)],
        "optimum": lambda: [Bar("search over CP-SAT's optimum, mean", optimum(5 if quick else 30)[0], 1.01)],
    }
    bars: list[Bar] = []
    for name in PARTS:
        if name not in skipped:
            bars += parts[name]()
    show("Bars", ["bar", "measured", "target", ""], [bar.row() for bar in bars])
    if arguments.json is not None:
        data = [dataclasses.asdict(bar) | {"met": bar.met} for bar in bars]
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0 if all(bar.met for bar in bars) else 1


def invalid(count: int) -> Bar:
    """Tight instances that end without a valid plan or a proof that there is none."""
    return Bar(f"of {count} tight instances, without plan or proof", float(tight(count)["INVALID PLAN"]), 0.0)


if __name__ == "__main__":
    sys.exit(main())
