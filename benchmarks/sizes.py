"""Published models at their sizes, simulated: plans over their bounds and over what teams do today, few microbatches.

    scripts/bench sizes [--models NAME,...] [--workloads NAME,...] [--microbatches N,...] [--schedules NAME,...]
                        [--budget S] [--evaluations N] [--batches B] [--partition S] [--no-text] [--json FILE]

For each model, workload and number of microbatches: the mean time of ``dip``'s plans over their proven bounds, on a
partition chosen on other batches; the bounds over the least work of a mean rank; the time of every other schedule over
dip's; throughput in FLOP/s over that of the language model alone on text, packed full, with as many FLOPs a rank (under
dip too, and under the best of Megatron's orders). A row takes minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.paper.flops import model_flops
from benchmarks.shared.plans import mean_seconds, plan_batches
from dip_megatron.describe.cost import load_cluster
from dip_megatron.describe.model import MultimodalModel, load_model
from dip_megatron.describe.workload import load_workload
from dip_megatron.planner.facade import (
    Effort,
    Setting,
    searched_partition,
)
from dip_megatron.schedulers.dip.engine import warm_up

MODELS = ("qwen2-5-vl-72b", "qwen3-vl-32b", "internvl3-5-38b", "qwen3-5-vl-27b")
WORKLOADS = ("vlm-any-resolution", "vlm-video")
BASELINES = ("encoder-first-stage", "encoders-first", "bigmac", "disttrain", "megatron-interleaved")
TEXT = ("dip", "megatron-1f1b", "megatron-interleaved")


@dataclass(frozen=True)
class Row:
    """One setting: seconds of dip's plans, these over their bounds, and the bounds over the work of a mean rank at its
    fastest (means over batches); what each other schedule takes over dip's (None: it can't run, or fits no
    memory); FLOP/s over those of text alone, under dip and the best of Megatron's orders; ``at_most``: what any
    schedule of these chunks could reach of text alone under dip, by its least work."""

    model: str
    workload: str
    microbatches: int
    seconds: float
    over_bound: float
    bound_over_work: float
    others: dict[str, float | None]
    of_text: float | None = None
    of_text_under_megatron: float | None = None
    at_most: float | None = None

    def cells(self, names: Sequence[str]) -> list[str]:
        """As text."""
        others = [self.others[n] for n in names]
        text = [self.of_text, self.at_most, self.of_text_under_megatron]
        return [
            self.model, self.workload, str(self.microbatches), f"{self.seconds:.3f}", f"{self.over_bound:.3f}",
            f"{self.bound_over_work:.3f}",
            *("-" if value is None else f"{value:.2f}" for value in others),
            *("-" if value is None else f"{value:.3f}" for value in text),
        ]  # fmt: skip


def flops(setting: Setting) -> float:
    """Mean FLOPs of a batch."""
    return float(np.mean([model_flops(setting.model, batch.microbatches) for batch in setting.batches]))


def alone(model: MultimodalModel) -> MultimodalModel:
    """The language model without encoders."""
    text = next(m for m in model.modules if m.input == "text")
    return replace(model, name=f"{model.name}-text", modules=(replace(text, upstream=()),))


def text_rates(setting: Setting, effort: Effort, partition_seconds: float) -> tuple[float, float]:
    """FLOP/s of the language model on text, with as many FLOPs: under dip, and under the best of Megatron's orders."""
    model = alone(setting.model)
    one = load_workload("text-packed", model, 1, 1, 0)
    each = model_flops(model, one[0].microbatches)
    count = max(1, round(flops(setting) / each))
    batches = load_workload("text-packed", model, 1, count, 0)
    text = Setting(model, setting.cluster, batches)
    partition = searched_partition(text, partition_seconds)
    rates = []
    for name in TEXT:
        plans = plan_batches(name, text, effort, partition)
        rates.append(0.0 if plans is None else count * each / mean_seconds(plans))
    return rates[0], max(rates[1:])


def row(
    name: str, workload: str, microbatches: int, schedules: Sequence[str], effort: Effort, batches: int,
    partition_seconds: float, cluster: str, text: bool,
) -> Row:  # fmt: skip
    """Plan one setting."""
    model = load_model(name)
    drawn, earlier = (load_workload(workload, model, batches, microbatches, seed) for seed in (0, 1))
    setting = Setting(model, load_cluster(cluster), drawn, earlier=earlier)
    partition = searched_partition(setting, partition_seconds)
    plans = plan_batches("dip", setting, effort, partition)
    assert plans is not None, f"{name}: no plan fits"
    seconds = mean_seconds(plans)
    others = {}
    for other in schedules:
        found = plan_batches(other, setting, effort, None if other == "dip-paper" else partition)
        others[other] = None if found is None else mean_seconds(found) / seconds
    over = float(np.mean([plan.iteration_time / plan.lower_bound for plan in plans]))
    work = [float((p.graph.forward + p.graph.fused).min(axis=0).sum()) / p.graph.ranks for p in plans]
    least = float(np.mean(work))
    filled = float(np.mean([plan.lower_bound / each for plan, each in zip(plans, work, strict=True)]))
    made = Row(name, workload, microbatches, seconds, over, filled, others)
    if not text:
        return made
    rate, megatrons = (flops(setting) / seconds / r for r in text_rates(setting, effort, partition_seconds))
    return replace(made, of_text=rate, of_text_under_megatron=megatrons, at_most=rate * seconds / least)


def main() -> int:
    """Print a row as soon as it is known, then all; 1 if dip is behind another schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--microbatches", default="16,8,4")
    parser.add_argument("--schedules", default=",".join(BASELINES))
    parser.add_argument("--cluster", default="h100")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds to search a plan")
    parser.add_argument("--evaluations", type=int, help="schedules to simulate for a plan, however busy the machine is")
    parser.add_argument("--partition", type=float, default=20.0, help="seconds to search a partition")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--no-text", action="store_true", help="leave out the language model alone")
    parser.add_argument("--json", type=Path, help="save the rows")
    arguments = parser.parse_args()
    names = [n for n in arguments.schedules.split(",") if n]
    warm_up()
    rows = []
    effort = Effort(arguments.budget, evaluations=arguments.evaluations)
    for name in arguments.models.split(","):
        for workload in arguments.workloads.split(","):
            for count in map(int, arguments.microbatches.split(",")):
                rows.append(
                    row(name, workload, count, names, effort, arguments.batches,
                        arguments.partition, arguments.cluster, not arguments.no_text)
                )  # fmt: skip
                print("  ".join(rows[-1].cells(names)), flush=True)
    head = ["model", "workload", "N", "seconds", "over bound", "bound over work",
            *(f"{n} / dip" for n in names), "of text",
            "at most", "of text under Megatron"]  # fmt: skip
    lines = [head, *(r.cells(names) for r in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    search = f"{arguments.budget:g} s" if effort.evaluations is None else f"{effort.evaluations} schedules"
    print(f"\nSimulated, {search} of search")
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    behind = [r for r in rows if any(v is not None and v < 1.0 for v in r.others.values())]
    return 1 if behind else 0


if __name__ == "__main__":
    sys.exit(main())
