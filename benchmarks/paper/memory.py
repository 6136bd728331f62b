"""Memory of VLM-M's rank 0 over an iteration, under Megatron's schedule, Optimus and DIP."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.shared.plans import mean_seconds
from dip_megatron.core import Kind
from dip_megatron.core.simulate import simulate_compiled
from dip_megatron.planner.facade import PlanningResult

from . import draw, quoted
from .cases import Budget, describe, load_case, mix_of, plan_all
from .record import Comparison, Result, Table
from .throughput import WEAK

MODEL, CLUSTER, RANK = "vlm-m", "h800", 0
SCHEDULES = (WEAK, "optimus", "dip-paper", "dip")


def run(budget: Budget, out: Path) -> Result:
    """Timelines of the first batch, and how much they fluctuate between the first and the last backward."""
    setting = load_case(MODEL, CLUSTER, 1, budget.microbatches)
    plans = {s: p[0] for s in SCHEDULES if (p := plan_all(s, setting, budget)) is not None}
    lines = {s: timeline(p, RANK) for s, p in plans.items()}
    swings = {s: fluctuation(line) for s, line in lines.items()}
    rows = [
        [s, f"{p.iteration_time:.3f}", f"{p.peak_bytes[RANK] / 1e9:.1f}", f"{p.graph.static_bytes[RANK] / 1e9:.1f}",
         f"{swings[s] / 1e9:.1f}", f"{p.recompute_fraction:.1%}"]
        for s, p in plans.items()
    ]  # fmt: skip
    return Result(
        title="Memory of VLM-M, rank 0",
        setting=f"Simulated. {describe(setting, mix_of(MODEL))}",
        tables=[Table("One iteration (simulated)",
                      ["schedule", "seconds", "peak GB", "static GB", "fluctuation GB", "recompute"], rows)],
        data={
            "simulated": {
                s: {"seconds": p.iteration_time, "peak_bytes": p.peak_bytes[RANK], "fluctuation_bytes": swings[s],
                    "timeline": [[float(t), float(b)] for t, b in lines[s]]}
                for s, p in plans.items()
            },
            "quoted": {"fluctuation": quoted.MEMORY_FLUCTUATION, "gain_over_optimus": quoted.MEMORY_GAIN},
        },
        comparisons=_comparisons(plans, swings),
        notes=["Fluctuation: standard deviation over time between the rank's first and last backward. The paper "
        "doesn't "
               "define its own."],
        figure=draw.lines(out / "memory.png", {s: [(t, b / 1e9) for t, b in line] for s, line in lines.items()},
                          "seconds (simulated)", "GB on rank 0 (simulated)", "VLM-M, memory of rank 0", step=True),
    )  # fmt: skip


def timeline(planned: PlanningResult, rank: int) -> list[tuple[float, float]]:
    """(seconds, bytes held from then on) of a rank, static bytes included; by the simulator's rules of memory."""
    graph, schedule = planned.graph, planned.schedule
    run_ = simulate_compiled(graph, schedule)
    held = float(graph.static_bytes[rank])
    line = [(0.0, held)]
    for code, start, end in zip(schedule.orders[rank].tolist(), run_.start[rank], run_.end[rank], strict=True):
        kind, row = divmod(code, graph.virtual_microbatches)
        c = int(schedule.strategy[row, rank])
        activation, deferred_activation = (
            float(graph.activation[c, row, rank]),
            float(graph.deferred_activation[c, row, rank]),
        )
        if kind == Kind.F:
            held += activation
            line.append((float(start), held))
            if not graph.has_backward[row, rank]:
                held -= activation
                line.append((float(end), held))
            continue
        if kind == Kind.W:
            held -= deferred_activation
        else:
            held += (deferred_activation if kind == Kind.B and graph.has_weight[row, rank] else 0.0) - activation
        line.append((float(end), held))
    return line


def fluctuation(line: list[tuple[float, float]]) -> float:
    """Standard deviation over time, bytes, from the first fall (the first backward) to the last rise (a forward)."""
    times, sizes = np.array(line).T
    change = np.diff(sizes)
    falls, rises = np.flatnonzero(change < 0), np.flatnonzero(change > 0)
    if not len(falls) or not len(rises) or falls[0] >= rises[-1]:
        return float(np.std(sizes))
    first, last = int(falls[0]) + 1, int(rises[-1]) + 1
    lengths = np.diff(times[first : last + 1])
    if lengths.sum() <= 0:
        return 0.0
    some = sizes[first:last]
    mean = np.average(some, weights=lengths)
    return float(np.sqrt(np.average((some - mean) ** 2, weights=lengths)))


def _comparisons(plans: dict[str, PlanningResult], swings: dict[str, float]) -> list[Comparison]:
    out = []
    if WEAK in plans and "dip-paper" in plans and swings[WEAK] > 0:
        out.append(
            Comparison(
                "fluctuation, dip-paper over Megatron", 1 + quoted.MEMORY_FLUCTUATION,
                swings["dip-paper"] / swings[WEAK],
                f"the paper doesn't define its measure (ours: standard deviation); Megatron spends "
                f"{plans[WEAK].recompute_fraction:.0%} of its compute time on recompute here, so that it peaks at "
                f"{plans[WEAK].peak_bytes[RANK] / 1e9:.0f} GB, dip-paper "
                f"{plans['dip-paper'].recompute_fraction:.0%} and "
                f"{plans['dip-paper'].peak_bytes[RANK] / 1e9:.0f} GB", "x",
            )
        )  # fmt: skip
    if "optimus" in plans and "dip-paper" in plans:
        out.append(
            Comparison(
                "throughput, dip-paper over Optimus, same memory limit", 1 + quoted.MEMORY_GAIN,
                mean_seconds([plans["optimus"]]) / mean_seconds([plans["dip-paper"]]),
                f"peaks {plans['optimus'].peak_bytes[RANK] / 1e9:.0f} and "
                f"{plans['dip-paper'].peak_bytes[RANK] / 1e9:.0f} GB; Optimus has one uniform strategy, which costs it "
                f"{plans['optimus'].recompute_fraction:.0%} of compute time, dip-paper's "
                f"{plans['dip-paper'].recompute_fraction:.0%}", "x",
            )
        )  # fmt: skip
    return out
