"""The dynamic run: 40 iterations of VLM-S whose bounds of the image count change all the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.shared.plans import mean_seconds
from dip_megatron.planner.facade import PlanningResult

from . import draw, quoted
from .cases import Budget, describe, load_case, plan_all, tuned_on
from .record import Comparison, Result, Table
from .throughput import WEAK

MODEL, CLUSTER, WORKLOAD = "vlm-s", "h800", "vlm-dynamic"
SCHEDULES = ("dip", "dip-paper", "nnscaler", "optimus", WEAK)
NAMED_ITERATION = 6


def run(budget: Budget, out: Path) -> Result:
    """Every iteration under five schedules; static ones are tuned on a spread of the same batches."""
    setting = tuned_on(load_case(MODEL, CLUSTER, budget.iterations, budget.microbatches, WORKLOAD), 5)
    found = {}
    for schedule in SCHEDULES:
        plans = plan_all(schedule, setting, budget, seconds=budget.search / 2)
        if plans is not None:
            found[schedule] = plans
    images = [[len(m.images) for m in batch.microbatches] for batch in setting.batches]
    rows = [
        [str(i + 1), f"{min(images[i])}..{max(images[i])}", *(f"{p[i].iteration_time:.3f}" for p in found.values())]
        for i in range(len(setting.batches))
    ]
    rows.append(["mean", "", *(f"{mean_seconds(p):.3f}" for p in found.values())])
    at = min(NAMED_ITERATION, len(setting.batches)) - 1
    return Result(
        title="Dynamic run of VLM-S",
        setting=f"Simulated. {describe(setting, WORKLOAD)} Search {budget.search / 2:g} s a plan.",
        tables=[Table("Seconds an iteration (simulated)", ["iteration", "images", *found], rows)],
        data={
            "simulated": {"seconds": {s: [x.iteration_time for x in p] for s, p in found.items()}},
            "measured": {"plan_seconds": {s: [x.plan_seconds for x in p] for s, p in found.items()}},
            "quoted": {"megatron_slower_at_6": quoted.DYNAMIC_MEGATRON, "others_slower_at_6": quoted.DYNAMIC_OTHERS},
        },
        comparisons=_comparisons(found, at),
        notes=[
            f"Seconds to plan an iteration (measured): dip {_median(found['dip']):.2f}, dip-paper "
            f"{_median(found['dip-paper']):.2f}, median."
        ],
        figure=draw.lines(
            out / "dynamic.png", {s: [(i + 1, x.iteration_time) for i, x in enumerate(p)] for s, p in found.items()},
            "iteration", "seconds (simulated)", "VLM-S, bounds of the image count changing"),
    )  # fmt: skip


def _median(plans: Sequence[PlanningResult]) -> float:
    return float(np.median([p.plan_seconds for p in plans]))


def _comparisons(found: Mapping[str, Sequence[PlanningResult]], at: int) -> list[Comparison]:
    """The named iteration; and what the same ratio is over the whole run, because one draw says little."""
    out = []
    for schedule, paper in ((WEAK, quoted.DYNAMIC_MEGATRON), ("nnscaler", quoted.DYNAMIC_OTHERS),
                            ("optimus", quoted.DYNAMIC_OTHERS)):  # fmt: skip
        if schedule not in found or "dip-paper" not in found:
            continue
        ratios = [a.iteration_time / b.iteration_time for a, b in zip(found[schedule], found["dip-paper"], strict=True)]
        reason = (
            f"one iteration is one draw of image counts, and the paper's draw is not published; over this run "
            f"the ratio goes "
            f"from {min(ratios):.2f} to {max(ratios):.2f}, mean {np.mean(ratios):.2f}"
        )
        out.append(Comparison(f"iteration {at + 1}: {schedule} over dip-paper", 1 + paper, ratios[at], reason, "x"))
    return out
