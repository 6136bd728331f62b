#!/usr/bin/env python3
"""Make the files of training recipes: scripts/make_recipes.py [NAME...] [--budget SECONDS] [--without-dip].

For each recipe of ``configs/train`` (default: all) reads what ``recipe.yaml`` is for, searches a partition
on the CPU, writes ``partition.yaml``, ``dip.yaml`` and ``megatron.args``, plans some batches, and puts the numbers
of the plans back into ``recipe.yaml``. Needs no GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dip_megatron.describe.cost import load_cluster
from dip_megatron.describe.model import load_model
from dip_megatron.describe.partition import read_partition, write_partition
from dip_megatron.describe.workload import load_workload
from dip_megatron.planner.facade import DoesNotFitError, Effort, Setting, make_planner, searched_partition
from dip_megatron.recipes import FOLDER, PlanningResult, dip_settings, load_recipe, megatron_flags, recipe_names
from dip_megatron.schedulers.common import BaselineError

BATCHES = 2
WITHOUT_DIP = ("encoder-first-stage", "megatron-interleaved")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
BEGIN, END = "<!-- table: made by scripts/make_recipes.py -->", "<!-- end of table -->"
MARK = "# From here on made by scripts/make_recipes.py; simulated, not measured.\n"


def make(name: str, budget: float, search: float, again: bool) -> None:
    """Write the files of one recipe; ``again``: search a partition even where there is one."""
    folder = FOLDER / name
    path = folder / "recipe.yaml"
    told = path.read_text(encoding="utf-8").split(MARK)[0]
    data = yaml.safe_load(told)
    model = load_model(data["model"])
    batches = load_workload(data["workload"], model, BATCHES, data["microbatches"], 0)
    setting = Setting(model, load_cluster(data["cluster"]), batches)
    if again or not (folder / "partition.yaml").is_file():
        write_partition(folder / "partition.yaml", searched_partition(setting, budget))
    partition = read_partition(folder / "partition.yaml", model)
    settings = yaml.safe_dump(
        dip_settings(data["cluster"], partition), sort_keys=False, default_flow_style=None, width=120
    )
    (folder / "dip.yaml").write_text(
        f"# For --dip-config. Layers are those of partition.yaml.\n{settings}", encoding="utf-8"
    )
    flags = "\n".join(megatron_flags(model, data["microbatches"]))
    (folder / "megatron.args").write_text(f"{flags}\n", encoding="utf-8")
    planner = make_planner("dip", setting, Effort(search), partition)
    plans = [planner(batch.microbatches) for batch in batches]
    planned = {
        "batches": len(plans),
        "iteration_seconds": round(float(np.mean([p.iteration_time for p in plans])), 3),
        "lower_bound_seconds": round(float(np.mean([p.lower_bound for p in plans])), 3),
        "memory_gb": [round(max(p.peak_bytes[r] for p in plans) / 1e9, 1) for r in range(model.parallel.pp)],
        "without_dip": without_dip(setting),
    }
    made = yaml.safe_dump({"planned": planned}, sort_keys=False, default_flow_style=None, width=120)
    path.write_text(told + MARK + made, encoding="utf-8")
    print(f"{name}: {planned}", flush=True)


def add_without_dip(name: str) -> None:
    """Put what an iteration takes without DIP into the files of one recipe; its plans stay as they are."""
    path = FOLDER / name / "recipe.yaml"
    told, _, made = path.read_text(encoding="utf-8").partition(MARK)
    data, planned = yaml.safe_load(told), yaml.safe_load(made)["planned"]
    model = load_model(data["model"])
    batches = load_workload(data["workload"], model, planned["batches"], data["microbatches"], 0)
    planned["without_dip"] = without_dip(Setting(model, load_cluster(data["cluster"]), batches))
    written = yaml.safe_dump({"planned": planned}, sort_keys=False, default_flow_style=None, width=120)
    path.write_text(told + MARK + written, encoding="utf-8")
    print(f"{name}: {planned['without_dip']}", flush=True)


def without_dip(setting: Setting) -> dict[str, float]:
    """Mean seconds under each of the static schedules that fits, tuned on the very batches."""
    found = {}
    for name in WITHOUT_DIP:
        try:
            planner = make_planner(name, setting, Effort())
            plans = [planner(batch.microbatches) for batch in setting.batches]
        except (BaselineError, DoesNotFitError):
            continue
        if all(plan.fits for plan in plans):
            found[name] = round(float(np.mean([plan.iteration_time for plan in plans])), 3)
    return found


def write_table() -> None:
    """Put the table of all recipes into the page that lists them."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


def table() -> str:
    """All recipes as Markdown."""
    head = ["recipe", "GPUs", "data mix", "s/iteration", "bound", *(f"`{n}`" for n in WITHOUT_DIP), "GB/rank of limit",
            "parts"]  # fmt: skip
    rows = [head, ["---"] * len(head)]
    for recipe in map(load_recipe, recipe_names()):
        p, planned = recipe.model.parallel, recipe.planned
        rows.append(
            [
                f"`{recipe.name}`",
                f"{p.gpus} {recipe.cluster.name.upper()} ({p.tp} x {p.pp} x {p.dp})",
                f"{recipe.workload}, {recipe.microbatches} microbatches",
                f"{planned.iteration_seconds:.2f}",
                f"{planned.lower_bound_seconds:.2f}",
                *(_without(planned, n) for n in WITHOUT_DIP),
                f"{max(planned.memory_gb):.1f} of {recipe.cluster.usable_bytes / 1e9:.0f}",
                "some lacking" if recipe.lacks else "all there",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _without(planned: PlanningResult, name: str) -> str:
    if not planned.without_dip:
        return "-"
    return f"{planned.without_dip[name]:.2f}" if name in planned.without_dip else "doesn't fit"


def main() -> None:
    """Make the recipes named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds to search a partition")
    parser.add_argument("--search", type=float, default=2.0, help="seconds to search a plan")
    parser.add_argument("--keep", action="store_true", help="keep the partitions that are there")
    parser.add_argument(
        "--without-dip", action="store_true", help="only what iterations take without DIP, beside plans that are there"
    )
    arguments = parser.parse_args()
    failed = []
    for name in arguments.names or recipe_names():
        if name not in recipe_names():
            parser.error(f"unknown recipe {name!r}; choose from {', '.join(recipe_names())}")
        try:
            if arguments.without_dip:
                add_without_dip(name)
            else:
                make(name, arguments.budget, arguments.search, not arguments.keep)
        except (ValueError, RuntimeError) as error:
            failed.append(f"{name}: {error}")
    write_table()
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
