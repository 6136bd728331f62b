"""The settings that parts share: models on clusters with batches, their partitions, and how much time may be spent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from benchmarks.shared.plans import plan_batches
from dip_megatron.describe.cost import load_cluster
from dip_megatron.describe.model import Partition, load_model
from dip_megatron.describe.workload import load_workload
from dip_megatron.planner.facade import (
    Effort,
    PlanningResult,
    Setting,
    searched_partition,
)
from dip_megatron.planner.partitioning import paper_partition
from dip_megatron.schedulers.registry import find_schedule

FIVE = ("vlm-s", "vlm-m", "vlm-l", "t2v-s", "t2v-l")


@dataclass(frozen=True)
class Budget:
    """What a run may spend. Seconds: of search a plan (``search``) and a partition (``partition``), of an exact solver
    an instance (``solver``), of the longest search for the picture of progress (``progress``). Counts: ``batches`` a
    model, ``microbatches`` a batch, ``iterations`` of the dynamic run, microbatch counts ``scales`` to solve."""

    name: str
    search: float
    partition: float
    solver: float
    progress: float
    batches: int
    microbatches: int
    iterations: int
    scales: tuple[int, ...]
    unit_sizes: tuple[int, ...]
    workers: int = 1

    def effort(self, seconds: float | None = None) -> Effort:
        return Effort(self.search if seconds is None else seconds, self.workers)


FULL = Budget("full", 2.0, 40.0, 60.0, 30.0, 4, 16, 40, (2, 4, 8, 10, 16, 32), (4, 5, 6, 8, 10, 12, 16, 24, 48))
QUICK = Budget("quick", 0.5, 8.0, 10.0, 8.0, 1, 16, 20, (2, 4, 8, 16), (4, 6, 8, 12, 16, 24, 48))
TINY = Budget("tiny", 0.02, 0.2, 0.3, 0.1, 1, 4, 1, (2,), (6, 12))
"""For tests: too little for numbers worth reading."""


def mix_of(model: str) -> str:
    """The paper's data mix for a model of that name."""
    return "t2v-mix" if model.startswith("t2v") else "vlm-mix"


@lru_cache(maxsize=32)
def load_case(
    name: str, cluster: str, batches: int, microbatches: int, workload: str | None = None, pp: int | None = None,
    dp: int | None = None,
) -> Setting:  # fmt: skip
    """A shipped model on a shipped cluster with drawn batches (seed 0), and those drawn before (seed 1)."""
    model = load_model(name).with_parallel(pp=pp, dp=dp)
    drawn, earlier = (load_workload(workload or mix_of(name), model, batches, microbatches, seed) for seed in (0, 1))
    return Setting(model, load_cluster(cluster), drawn, earlier=earlier)


@lru_cache(maxsize=32)
def our_partition(setting: Setting, seconds: float) -> Partition:
    """What ``dip partition`` chooses in so many seconds."""
    return searched_partition(setting, seconds)


@lru_cache(maxsize=32)
def papers_partition(setting: Setting) -> Partition:
    """The paper's rules."""
    return paper_partition(setting.model, setting.cluster, setting.known)


def tuned_on(setting: Setting, count: int) -> Setting:
    """The setting with ``count`` of its batches, evenly spread, as those that are known before the run."""
    every = max(1, len(setting.batches) // count)
    return replace(setting, earlier=setting.batches[::every])


def plan_all(
    name: str,
    setting: Setting,
    budget: Budget,
    *,
    seconds: float | None = None,
    given: Partition | None = None,
) -> list[PlanningResult] | None:
    """Every batch of the setting planned under schedule ``name``; None if the schedule can't run them or does not fit.

    ``given``: the partition of all segmented schedules.
    """
    searched = None
    entry = find_schedule(name)
    if given is None and entry.mixed is None and entry.partition != "paper":
        searched = our_partition(setting, budget.partition)
    return plan_batches(name, setting, budget.effort(seconds), given, searched)


def describe(setting: Setting, workload: str) -> str:
    """The setting in words."""
    model, parallel = setting.model, setting.model.parallel
    count, each = len(setting.batches), len(setting.batches[0].microbatches)
    return (
        f"{model.name} on {parallel.gpus} {setting.cluster.name.upper()} (TP {parallel.tp}, PP {parallel.pp}, DP "
        f"{parallel.dp}), {count} batch{'es' * (count > 1)} of {each} microbatches from {workload}."
    )
