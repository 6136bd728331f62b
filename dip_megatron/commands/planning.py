"""Plans by the name of their schedule: what ``dip plan``, ``dip compare`` and the planner's benchmark share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np

from ..core import Kind, Plan, Schedule, SearchStatistics, StageGraph
from ..core.bounds import lower_bound
from ..core.lower import make_plan
from ..core.simulate import simulate_compiled
from ..describe.cost import Cluster, CostModel, Costs, cost_model, paper_cost_model, segmented_graph
from ..describe.model import MultimodalModel, Partition
from ..describe.workload import GlobalBatch, Microbatch
from ..planner.partitioning import choose_partition, paper_partition
from ..schedulers import (
    STATIC_BASELINES,
    Fitted,
    StaticChoice,
    StaticName,
    least_recompute,
    least_recompute_by_module,
    optimus_leads,
    segmented_static,
    static_plan,
    tune_static,
)
from ..schedulers.dip import DoesNotFitError, SearchOptions, search

SEARCHED = ("dip", "dip-paper")
SEGMENTED = ("optimus", "segmented-static")
SCHEDULES: tuple[str, ...] = (*SEARCHED, *STATIC_BASELINES[:-1], "optimus", "nnscaler", "segmented-static")


class DoesNotFit(ValueError):
    """A schedule that fits the memory of no rank in any way tried; the message says where and by how much."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A model on a cluster with batches to plan. ``memory_limit`` bytes per rank (None: what the GPUs can use);
    ``earlier``: the batches on which partitions and static plans are chosen, which training keeps (none: they are
    chosen in hindsight, on the batches that are planned)."""

    model: MultimodalModel
    cluster: Cluster
    batches: tuple[GlobalBatch, ...]
    costs: Costs | None = None
    memory_limit: float | None = None
    earlier: tuple[GlobalBatch, ...] = ()

    @property
    def known(self) -> tuple[GlobalBatch, ...]:
        """The batches that are known before training."""
        return self.earlier or self.batches

    @property
    def pricer(self) -> CostModel:
        return cost_model(self.model, self.cluster, self.costs)

    @property
    def paper_pricer(self) -> CostModel:
        """For ``dip-paper``."""
        return paper_cost_model(self.model, self.cluster, self.costs)

    @property
    def microbatches(self) -> list[Sequence[Microbatch]]:
        return [batch.microbatches for batch in self.batches]


@dataclass(frozen=True)
class Effort:
    """What a search may spend: seconds, threads, and, for a result that repeats, a number of evaluations."""

    budget_seconds: float = 1.0
    workers: int = 1
    seed: int = 0
    evaluations: int | None = None
    deterministic: bool = False
    options: SearchOptions = field(default_factory=SearchOptions)


@dataclass(frozen=True, eq=False)
class Planned:
    """One batch's plan: ``plan_seconds`` from the batch to the schedule (pricing included, tuning before training not);
    ``recompute_fraction``, the share of all compute time that the memory strategies cost."""

    graph: StageGraph
    schedule: Schedule
    statistics: SearchStatistics
    iteration_time: float
    bubble_ratio: float
    peak_bytes: tuple[float, ...]
    lower_bound: float
    fits: bool
    recompute_fraction: float
    plan_seconds: float
    name: str

    def plan(self) -> Plan:
        """The plan with its actions. Raises DeadlockError if the orders can't end."""
        return make_plan(
            self.graph, self.schedule, lower_bound=self.lower_bound, name=self.name, search=self.statistics
        )


Planner = Callable[[Sequence[Microbatch]], Planned]


def make_planner(
    name: str, setting: Setting, effort: Effort, given: Partition | None = None, *,
    searched: Partition | None = None, partition_seconds: float = 20.0, progress: Callable[[], None] = lambda: None,
) -> Planner:  # fmt: skip
    """What plans one batch after the other under schedule ``name``; all that is chosen before training is chosen
    here.

    ``given`` is the partition of all schedules over modality-segmented chunks. Without it ``dip`` takes ``searched``,
    or searches for ``partition_seconds``, ``dip-paper`` follows the paper's rules, and the static orders take the
    better of the two. Raises ValueError for an unknown name, and what the partitioner and the baselines raise.
    """
    if name in get_args(StaticName):
        known = [batch.microbatches for batch in setting.known]
        choice = tune_static(name, setting.pricer, known, setting.memory_limit, progress)  # type: ignore[arg-type]
        return lambda microbatches: _static(setting, choice, microbatches)
    if name not in (*SEARCHED, *SEGMENTED):
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    partitions = [given] if given is not None else []
    if given is None and name != "dip-paper":
        partitions.append(searched or searched_partition(setting, partition_seconds))
    if given is None and name != "dip":
        partitions.append(paper_partition(setting.model, setting.cluster, setting.known, costs=setting.costs))
    if name in SEGMENTED:
        return _segmented(name, setting, partitions)
    return lambda microbatches: _searched(name, setting, partitions[0], microbatches, effort)


def searched_partition(setting: Setting, seconds: float) -> Partition:
    """:func:`choose_partition` for a setting."""
    return choose_partition(
        setting.model, setting.cluster, setting.known, costs=setting.costs, memory_limit=setting.memory_limit,
        budget_seconds=seconds,
    )  # fmt: skip


def _searched(
    name: str, setting: Setting, partition: Partition, microbatches: Sequence[Microbatch], effort: Effort
) -> Planned:
    start = time.perf_counter()
    pricer = setting.paper_pricer if name == "dip-paper" else setting.pricer
    graph = segmented_graph(pricer, partition, microbatches, setting.memory_limit)
    try:
        found = search(
            graph, schedule=name, budget_seconds=effort.budget_seconds, seed=effort.seed, workers=effort.workers,
            evaluations=effort.evaluations, deterministic=effort.deterministic, options=effort.options,
        )  # fmt: skip
    except DoesNotFitError as error:
        raise DoesNotFit(str(error)) from error
    seconds = time.perf_counter() - start
    statistics = SearchStatistics(found.seconds, found.evaluations, found.workers, found.seed)
    return describe(graph, found.schedule, name, seconds, statistics, found.lower_bound)


def _static(setting: Setting, choice: StaticChoice, microbatches: Sequence[Microbatch]) -> Planned:
    start = time.perf_counter()
    graph, fitted = static_plan(setting.pricer, choice, microbatches, setting.memory_limit)
    return describe(graph, fitted.schedule, choice.name, time.perf_counter() - start)


def _segmented(name: str, setting: Setting, partitions: Sequence[Partition]) -> Planner:
    def apply(partition: Partition, microbatches: Sequence[Microbatch]) -> tuple[StageGraph, Fitted]:
        graph = segmented_graph(setting.pricer, partition, microbatches, setting.memory_limit)
        if name == "optimus":
            return graph, least_recompute(graph, optimus_leads)
        return graph, least_recompute_by_module(graph, segmented_static)

    def worth(partition: Partition) -> tuple[bool, float]:
        fitted = [apply(partition, batch.microbatches)[1] for batch in setting.known]
        return not all(f.fits for f in fitted), sum(f.timeline.iteration_time for f in fitted)

    best = min(partitions, key=worth) if len(partitions) > 1 else partitions[0]

    def plan(microbatches: Sequence[Microbatch]) -> Planned:
        start = time.perf_counter()
        graph, fitted = apply(best, microbatches)
        return describe(graph, fitted.schedule, name, time.perf_counter() - start)

    return plan


def describe(
    graph: StageGraph,
    schedule: Schedule,
    name: str,
    plan_seconds: float,
    statistics: SearchStatistics | None = None,
    bound: float | None = None,
) -> Planned:
    """Simulate a schedule and put down all that is reported about it. The bound is that of its own graph: with split
    backwards where the schedule splits any."""
    timeline = simulate_compiled(graph, schedule)
    if bound is None:
        bound = lower_bound(graph, split=splits(graph, schedule))
    return Planned(
        graph=graph,
        schedule=schedule,
        statistics=statistics or SearchStatistics(plan_seconds, 1, 1, 0),
        iteration_time=timeline.iteration_time,
        bubble_ratio=timeline.bubble_ratio,
        peak_bytes=tuple(float(b) for b in timeline.peak_bytes),
        lower_bound=bound,
        fits=bool(np.all(timeline.peak_bytes <= graph.memory_limit)),
        recompute_fraction=recompute_fraction(graph, schedule),
        plan_seconds=plan_seconds,
        name=name,
    )


def splits(graph: StageGraph, schedule: Schedule) -> bool:
    """Whether any stage of the schedule runs B and W apart."""
    return any(bool(np.any(order // graph.virtual_microbatches == int(Kind.W))) for order in schedule.orders)


def recompute_fraction(graph: StageGraph, schedule: Schedule) -> float:
    """Share of all compute time that is spent on the memory strategies: on recomputing, and waiting for offloading."""
    chosen = np.take_along_axis(graph.forward + graph.fused, schedule.strategy[None].astype(np.int64), axis=0)[0]
    fastest = (graph.forward + graph.fused).min(axis=0)
    total = float(chosen.sum())
    return float((chosen - fastest).sum()) / total if total > 0 else 0.0


def with_memory(setting: Setting, factor: float) -> Setting:
    """The same setting with a share of the memory it has."""
    limit = setting.memory_limit if setting.memory_limit is not None else setting.pricer.cluster.usable_bytes
    return replace(setting, memory_limit=limit * factor)
