"""Sub-microbatch sizes of the ViT of VLM-S, and what each does to the best schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from dip_megatron.cost import segmented_graph
from dip_megatron.model import Partition
from dip_megatron.search import search

from . import draw, quoted
from .cases import Budget, describe, load_case, mix_of, papers_partition
from .record import Comparison, Result, Table

MODEL, CLUSTER = "vlm-s", "h800"


def run(budget: Budget, out: Path) -> Result:
    """Iteration time of dip-paper and dip against the number of images at a time, all else as the paper's rules say."""
    setting = load_case(MODEL, CLUSTER, budget.batches, budget.microbatches)
    rules = papers_partition(setting)
    times: dict[str, dict[int, float]] = {"dip-paper": {}, "dip": {}}
    for size in budget.unit_sizes:
        modules = tuple(replace(m, unit_size=size) if m.module == "vision" else m for m in rules.modules)
        for schedule, found in times.items():
            seconds = []
            for microbatches in setting.microbatches:
                graph = segmented_graph(setting.pricer, Partition(modules), microbatches, setting.memory_limit)
                result = search(graph, schedule=schedule, budget_seconds=budget.search, workers=budget.workers)
                seconds.append(result.iteration_time)
            found[size] = float(np.mean(seconds))
    rows = [
        [str(size), *(text for found in times.values() for text in (f"{found[size]:.3f}", _over_best(found, size)))]
        for size in budget.unit_sizes
    ]
    return Result(
        title="Sub-microbatch size of VLM-S",
        setting=f"Simulated. {describe(setting, mix_of(MODEL))} {rules.explain().splitlines()[0]} (the paper's rules)",
        tables=[Table("Seconds an iteration against images at a time",
                      ["images", "dip-paper s (simulated)", "over its best", "dip s (simulated)", "over its best"], rows)],
        data={
            "simulated": {"seconds": {s: {str(k): v for k, v in f.items()} for s, f in times.items()}},
            "quoted": {"gap_4_to_12": quoted.UNIT_SIZE_GAP, "best": quoted.UNIT_SIZE_BEST,
                       "cost_below_8": quoted.UNIT_SIZE_COST},
        },
        comparisons=_comparisons(times["dip-paper"]),
        notes=[f"The 95% rule chooses {rules.module('vision').unit_size} images; the paper's best is "
               f"{quoted.UNIT_SIZE_BEST} (quoted)."],
        figure=draw.lines(out / "unit_size.png", {s: list(f.items()) for s, f in times.items()},
                          "images at a time", "seconds an iteration (simulated)", "VLM-S, size of sub-microbatches"),
    )  # fmt: skip


def _over_best(found: dict[int, float], size: int) -> str:
    return f"{found[size] / min(found.values()) - 1:+.1%}"


def _comparisons(found: dict[int, float]) -> list[Comparison]:
    some = {k: v for k, v in found.items() if 4 <= k <= 12}
    best = min(found, key=lambda k: found[k])
    out = [
        Comparison(
            "worst over best at 4 to 12 images", 1 + quoted.UNIT_SIZE_GAP, max(some.values()) / min(some.values()),
            "our matmul efficiency falls towards small sizes by an assumed curve (configs/clusters), the paper's is measured",
            "x",
        ),
        Comparison(
            "best size", quoted.UNIT_SIZE_BEST, best,
            f"sizes near it are as good: {quoted.UNIT_SIZE_BEST} images are "
            f"{found.get(quoted.UNIT_SIZE_BEST, np.nan) / found[best] - 1:+.1%} from the best", " images",
        ),
    ]  # fmt: skip
    small = [v for k, v in found.items() if k < 8]
    if small:
        out.append(
            Comparison("fewer than 8 images over the best", 1 + quoted.UNIT_SIZE_COST, max(small) / min(found.values()),
                       "the efficiency curves of small operators are assumed, not measured", "x")
        )  # fmt: skip
    return out
