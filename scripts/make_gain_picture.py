#!/usr/bin/env python3
"""Draw the README's picture of the gain, a batch under three schedules: ``python -m scripts.make_gain_picture``."""

from __future__ import annotations

from pathlib import Path

import click

from dip_megatron.core.simulate import simulate
from dip_megatron.describe.cost import load_cluster
from dip_megatron.describe.model import load_model
from dip_megatron.describe.workload import load_workload
from dip_megatron.planner.facade import Effort, Setting, make_planner
from dip_megatron.report.figure import plot_replicas
from dip_megatron.report.spans import spans_of

ROOT = Path(__file__).resolve().parent.parent
SCHEDULES = {
    "megatron-parameter-balanced": "Megatron, balanced by parameters",
    "megatron-interleaved": "Megatron, best split of many",
    "dip": "DIP",
}


@click.command()
@click.option("--model", default="vlm-s", show_default=True)
@click.option("--cluster", default="h100", show_default=True)
@click.option("--workload", default="vlm-mix", show_default=True)
@click.option("--microbatches", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--budget", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Seconds of search.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "docs/images/gain.png", show_default=True)
def main(model: str, cluster: str, workload: str, microbatches: int, budget: float, out: Path) -> None:
    """Plan a batch under each schedule, on partitions chosen on earlier ones, and draw all on one clock."""
    described = load_model(model)
    (batch,), earlier = (load_workload(workload, described, n, microbatches, seed) for seed, n in ((0, 1), (1, 8)))
    setting = Setting(described, load_cluster(cluster), (batch,), None, None, tuple(earlier))
    drawn = {}
    for name, title in SCHEDULES.items():
        planned = make_planner(name, setting, Effort(budget, workers=2))(batch.microbatches)
        drawn[title] = spans_of(planned.graph, planned.schedule, simulate(planned.graph, planned.schedule))
        click.echo(f"{title}: {planned.iteration_time:.3f} s, {planned.bubble_ratio:.1%} bubbles")
    plot_replicas(out, drawn)


if __name__ == "__main__":
    main()
