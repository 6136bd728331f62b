"""Sub-microbatch sizes of the ViT of VLM-S, and what each does to the best schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dip_megatron.describe.cost import priced_graph
from dip_megatron.describe.model import Partition
from dip_megatron.describe.partition.unit_size import mean_instance, module_seconds, times
from dip_megatron.planner.facade import Setting
from dip_megatron.schedulers.dip.engine import search

from . import draw, quoted
from .cases import Budget, describe, load_case, mix_of, papers_partition
from .record import Comparison, Result, Table

MODEL, CLUSTER = "vlm-s", "h800"


def run(budget: Budget, out: Path) -> Result:
    """Iteration time of dip-paper and dip against the number of images at a time, all else as the paper's rules say."""
    setting = load_case(MODEL, CLUSTER, budget.batches, budget.microbatches)
    rules = papers_partition(setting)
    found: dict[str, dict[int, float]] = {"dip-paper": {}, "dip": {}}
    for size in budget.unit_sizes:
        modules = tuple(replace(m, unit_size=size) if m.module == "vision" else m for m in rules.modules)
        for schedule, by_size in found.items():
            seconds = []
            for microbatches in setting.microbatches:
                graph = priced_graph(setting.pricer, Partition(modules), microbatches, setting.memory_limit)
                result = search(graph, schedule=schedule, budget_seconds=budget.search, workers=budget.workers)
                seconds.append(result.iteration_time)
            by_size[size] = float(np.mean(seconds))
    alone = kernel_cost(setting, budget.unit_sizes)
    rows = [
        [
            str(size),
            f"{1e3 * alone[size]:.2f}",
            *(text for f in found.values() for text in (f"{f[size]:.3f}", _over_best(f, size))),
        ]
        for size in budget.unit_sizes
    ]
    return Result(
        title="Sub-microbatch size of VLM-S",
        setting=f"Simulated. {describe(setting, mix_of(MODEL))} {rules.explain().splitlines()[0]} (the paper's rules)",
        tables=[Table("Seconds an iteration against images at a time",
                      ["images", "ViT alone, ms an image (simulated)", "dip-paper s (simulated)", "over its "
                      "best", "dip s (simulated)", "over its best"], rows)],
        data={
            "simulated": {"seconds": {s: {str(k): v for k, v in f.items()} for s, f in found.items()},
                          "vision_seconds_per_image": {str(k): v for k, v in alone.items()}},
            "quoted": {"gap_4_to_12": quoted.UNIT_SIZE_GAP, "best": quoted.UNIT_SIZE_BEST,
                       "cost_below_8": quoted.UNIT_SIZE_COST},
        },
        comparisons=_comparisons(found["dip-paper"], alone),
        notes=[f"The 95% rule chooses {rules.module('vision').unit_size} images; the paper's best is "
               f"{quoted.UNIT_SIZE_BEST} (quoted)."],
        figure=draw.lines(out / "unit_size.png", {s: list(f.items()) for s, f in found.items()},
                          "images at a time", "seconds an iteration (simulated)", "VLM-S, size of sub-microbatches"),
    )  # fmt: skip


def _over_best(found: dict[int, float], size: int) -> str:
    return f"{found[size] / min(found.values()) - 1:+.1%}"


def kernel_cost(setting: Setting, sizes: Sequence[int]) -> dict[int, float]:
    """Seconds of the ViT alone per image, so many images at a time: what kernels make of small sizes."""
    instance, _ = mean_instance(setting.model.module("vision"), [m for b in setting.microbatches for m in b])
    assert instance is not None
    seconds = module_seconds(setting.pricer, "vision", times(instance, list(sizes)))
    return {size: float(s) / size for size, s in zip(sizes, seconds, strict=True)}


def _comparisons(found: dict[int, float], alone: dict[int, float]) -> list[Comparison]:
    some = {k: v for k, v in found.items() if 4 <= k <= 12}
    best, least, most = min(found, key=lambda k: found[k]), min(some), max(some)
    kernels = (
        f"the cost model's kernels make an image {alone[least] / alone[most] - 1:+.1%} dearer {least} at a time "
        f"than {most} "
        "at a time, by assumed efficiencies of small operators; the rest is the schedule's"
    )
    out = [
        Comparison("worst over best at 4 to 12 images", 1 + quoted.UNIT_SIZE_GAP,
                   max(some.values()) / min(some.values()), kernels, "x"),
        Comparison(
            "best size", quoted.UNIT_SIZE_BEST, best,
            f"the curve is flat there: {quoted.UNIT_SIZE_BEST} images are "
            f"{found.get(quoted.UNIT_SIZE_BEST, np.nan) / found[best] - 1:+.1%} from the best", " images",
        ),
    ]  # fmt: skip
    small = [v for k, v in found.items() if k < 8]
    if small:
        out.append(Comparison("fewer than 8 images over the best", 1 + quoted.UNIT_SIZE_COST,
                              max(small) / min(found.values()), kernels, "x"))  # fmt: skip
    return out
