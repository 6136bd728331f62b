"""Prints what searches still have to load, or to compile, once everything has been warmed up; run in a process of its
own, as others have searched before."""

from __future__ import annotations

import sys

from numba.core.dispatcher import Dispatcher

from dip_megatron.planner.warm import warm_up_joint_search, warm_up_plans
from dip_megatron.schedulers.dip.engine import search, warm_up
from dip_megatron.schedulers.joint import search_joint
from tests.graphs import random_graph, with_memory
from tests.schedulers.joint.test_joint import coupled


def loaded() -> dict[str, int]:
    """By kernel: for how many kinds of arguments it is there."""
    return {
        f"{name}.{attribute}": len(kernel.signatures)
        for name, module in list(sys.modules.items())
        if name.startswith("dip_megatron.")
        for attribute, kernel in vars(module).items()
        if isinstance(kernel, Dispatcher)
    }


def main() -> None:
    """Search for pipelines, then for replicas that share experts, all of them short of memory: of each, with no more
    warmed up than is for it."""
    warm_up_plans()
    warm_up()
    before = loaded()
    for seed in range(6):
        graph = with_memory(random_graph(seed), 1.2)
        for schedule in ("dip", "dip-paper"):
            search(graph, schedule=schedule, budget_seconds=600.0, evaluations=400)
    tell(before)
    warm_up_joint_search()
    before = loaded()
    for seed in range(6):
        graphs, experts = coupled(seed, 2.0)
        search_joint(graphs, experts, budget_seconds=600.0, evaluations=1000)
    tell(before)


def tell(before: dict[str, int]) -> None:
    """Print those that weren't there ``before``."""
    for name, count in loaded().items():
        if count != before.get(name, 0):
            print(name)


if __name__ == "__main__":
    main()
