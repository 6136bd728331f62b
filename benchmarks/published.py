"""What public recipes of models with experts take as published, and under other schedules. Simulated.

    scripts/bench published [--models glm-4-5v,...] [--microbatches 64] [--evaluations 20000] [--json FILE]

Megatron-Bridge's recipes for H100s with their parallel sizes, replicas, microbatches (at most ``--microbatches`` of
them are drawn) and sequences, drawn from ``vlm-any-resolution``. ``as published``: the encoder whole on the first stage
and layers of the language model on chunks as the recipe lays them out. Other schedules choose their chunks on batches
drawn before; all of them recompute as little as fits, and wait for one another in every stage with experts, as replicas
that share an expert group do. ``over dip`` is over joint plans without an exchange. Left out: overlap of the experts'
exchange with compute inside a chunk, which four of these recipes ask for; it would shorten all rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.joint import (
    WITH_EXPERTS,
    Baselines,
    Draw,
    coupled_work,
    exchanged,
    experts_of,
    graphs_of,
    groups,
    joint,
)
from benchmarks.replicas import Case, Seconds
from dip_megatron.core.simulate import fit_in_memory
from dip_megatron.describe.cost import cost_model, load_cluster, priced_graph
from dip_megatron.describe.model import MultimodalModel, Parallel, Partition, load_model
from dip_megatron.describe.workload import load_workload
from dip_megatron.planner.partitioning import choose_partition
from dip_megatron.report.schedules import text_table
from dip_megatron.schedulers.common import BaselineError
from dip_megatron.schedulers.dip.engine import warm_up
from dip_megatron.schedulers.joint import as_they_come
from dip_megatron.schedulers.joint.others import mixed_experts, schedule_together
from dip_megatron.schedulers.registry import find_schedule
from dip_megatron.schedulers.static import given_choice

MIX = "vlm-any-resolution"
PUBLISHED, FIRST_STAGE = "as published", "encoder-first-stage"
BASELINES = (FIRST_STAGE, "megatron-interleaved", "encoders-first", "bigmac", "disttrain")
TRIALS = 25
"""Partitions judged for each recipe."""


@dataclass(frozen=True)
class Recipe:
    """A public recipe: its function in Megatron-Bridge 0.6, sizes, microbatches of a replica in an iteration, tokens of
    one, and layers of the language model on each chunk, ``[segment][rank]``."""

    function: str
    parallel: Parallel
    microbatches: int
    tokens: int
    layers: tuple[tuple[int, ...], ...]


def even(layers: int, ranks: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    """Layers spread evenly, ``[chunk][rank]``; where they don't divide, the first and the last ones have fewer, as
    ``account_for_embedding_in_pipeline_split`` and its like for the loss do."""
    stages = ranks * chunks
    counts = np.full(stages, layers // stages)
    rest = layers - int(counts.sum())
    start = (stages - rest + 1) // 2
    counts[start : start + rest] += 1
    return tuple(tuple(int(n) for n in row) for row in counts.reshape(chunks, ranks))


def _sizes(tp: int, pp: int, dp: int, ep: int) -> Parallel:
    return Parallel(tp, pp, dp, sequence_parallel=tp > 1, ep=ep, etp=1)


RECIPES = {
    "qwen3-vl-30b-a3b": Recipe(
        "qwen3_vl_30b_a3b_pretrain_16gpu_h100_bf16_config", _sizes(1, 2, 8, 8), 64, 4096, even(48, 2, 12)
    ),
    "qwen3-vl-235b-a22b": Recipe(
        "qwen3_vl_235b_a22b_pretrain_256gpu_h100_bf16_config", _sizes(2, 8, 16, 32), 64, 4096, even(94, 8, 4)
    ),
    "qwen3-5-vl-35b-a3b": Recipe(
        "qwen35_vl_35b_a3b_pretrain_16gpu_h100_bf16_config", _sizes(1, 2, 8, 8), 64, 4096, even(40, 2, 12)
    ),
    "qwen3-5-vl-397b-a17b": Recipe(
        "qwen35_vl_397b_a17b_pretrain_256gpu_h100_bf16_config", _sizes(2, 8, 16, 32), 64, 4096, even(60, 8, 4)
    ),
    "glm-4-5v": Recipe(
        "glm_45v_sft_128gpu_h100_bf16_config", _sizes(1, 8, 16, 16), 4, 8192, ((1, 7, 7, 7, 7, 7, 7, 3),)
    ),
    "kimi-k2-5": Recipe(
        "kimi_k25_vl_sft_512gpu_h100_bf16_config", _sizes(2, 16, 16, 32), 256, 4096, ((4,) * 15 + (1,),)
    ),
}  # fmt: skip


def published_model(name: str, recipe: Recipe) -> MultimodalModel:
    """The model at the sizes of its recipe."""
    model = load_model(name)
    return replace(model, parallel=recipe.parallel, packing=replace(model.packing, max_tokens=recipe.tokens))


def published_choice(model: MultimodalModel, recipe: Recipe) -> Partition:
    """The chunks of a recipe: encoders whole on the first stage."""
    chunks, ranks = len(recipe.layers), recipe.parallel.pp
    layers = {m.name: tuple(tuple(m.layers * (k == r == 0) for r in range(ranks)) for k in range(chunks))
              for m in model.modules}  # fmt: skip
    return given_choice(FIRST_STAGE, model, layers | {WITH_EXPERTS: recipe.layers})


def as_published(case: Case, choice: Partition, draw: Draw, size: int) -> tuple[float, bool]:
    """(the slowest group's seconds, whether it fits) under Megatron's own order."""
    times, fits, experts = [], True, mixed_experts(choice, [WITH_EXPERTS])
    for batches in groups(draw.batches, size):
        graphs = [priced_graph(case.pricer, choice, b) for b in batches]
        found = schedule_together(find_schedule(FIRST_STAGE), graphs, experts, as_they_come(graphs))
        times.append(found.iteration_time)
        fits = fits and fit_in_memory(graphs, found.schedules)
    return max(times), fits


@dataclass(frozen=True)
class Measured:
    """Of a recipe: ``seconds`` under every schedule with a note on some, and of working out the exchange."""

    model: str
    recipe: str
    microbatches: int
    coupled: int
    exchange: float
    seconds: dict[str, float]
    notes: dict[str, str]


def measure(name: str, most: int, evaluations: int, baselines: Sequence[str]) -> Measured:
    """A recipe under every schedule; raises what partitions and searches raise where it doesn't fit."""
    recipe, start = RECIPES[name], time.perf_counter()
    model, cluster = published_model(name, recipe), load_cluster("h100")
    count, size = min(recipe.microbatches, most), recipe.parallel.coupled
    earlier = load_workload(MIX, model, 1, count, 1)
    partition = choose_partition(model, cluster, earlier, budget_seconds=np.inf, max_trials=TRIALS)
    case = Case(name, model, partition, cost_model(model, cluster), MIX, Seconds(None), count)
    draw = Draw("as they come", list(case.independent(recipe.parallel.dp, 5)), False)
    seconds: dict[str, float] = {}
    notes: dict[str, str] = {}

    def tell(row: str, value: float, note: str = "") -> None:
        seconds[row], notes[row] = value, note
        print(f"{name} {row}: {value:.3f} s {note} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)

    value, fits = as_published(case, published_choice(model, recipe), draw, size)
    tell(PUBLISHED, value, "" if fits else "doesn't fit 80 GB")
    tuned = Baselines.of(case, baselines)
    experts = experts_of(case, graphs_of(case, draw.batches[:1])[0].modules)
    for row in tuned.names:
        try:
            tell(row, tuned.seconds(row, draw, experts, size, max(1, evaluations // 10)))
        except BaselineError as error:
            print(f"{name} {row}: {error}", file=sys.stderr, flush=True)
    found = joint(case, replace(draw, paired=True), experts, size, evaluations)
    tell("dip", found["dip"], f"{found['over bound']:.3f} over its bound")
    work = coupled_work(graphs_of(case, draw.batches), experts, size)
    batches, _, spent = exchanged(work, [m for b in draw.batches for m in b])
    found = joint(case, Draw("exchanged", batches, True), experts, size, evaluations)
    tell("dip, exchange", found["dip"], f"{found['over bound']:.3f} over its bound")
    return Measured(name, recipe.function, count, size, spent, seconds, notes)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(RECIPES))
    parser.add_argument("--microbatches", type=int, default=64, help="at most so many a replica")
    parser.add_argument("--evaluations", type=int, default=20_000, help="schedules tried a group")
    parser.add_argument("--baselines", default=",".join(BASELINES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    models = options.models.split(",")
    if unknown := set(models) - set(RECIPES):
        parser.error(f"no recipe of {', '.join(sorted(unknown))} here; there are {', '.join(RECIPES)}")
    warm_up()
    names = [n for n in options.baselines.split(",") if n]
    data = [measure(m, options.microbatches, options.evaluations, names) for m in models]
    for row in data:
        seconds, notes = row.seconds, row.notes
        print(f"\n{row.model} ({row.recipe}): {row.microbatches} microbatches a replica, groups of {row.coupled} "
              "replicas; simulated")  # fmt: skip
        lines = [[name, f"{s:.3f}", f"{s / seconds['dip']:.3f}", notes[name]] for name, s in seconds.items()]
        print(text_table(["schedule", "seconds", "over dip", ""], lines), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in data], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
