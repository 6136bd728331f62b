"""The one way to plan: what a model, a cluster, batches and a budget are, in; a plan with its bound, out.

The ``dip`` command, the scripts and training plan here: :func:`make_planner` for a workload's batches,
:func:`live_maker` for the batches of a run. Both price a batch with :class:`.model_graphs.ModelGraphs` and put it in
order with the same entry of the registry, so that equal inputs and a budget counted in evaluations give equal plans.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..core.experts import NO_EXPERTS, ExpertLayers
from ..core.simulate import simulate_compiled
from ..describe.cost import Cluster, CostModel, Costs
from ..describe.model import MultimodalModel, Partition
from ..describe.workload import GlobalBatch, Microbatch
from ..schedulers.dip.feasibility import DoesNotFitError
from ..schedulers.entry import Effort, Found, Problem, ScheduleEntry
from ..schedulers.registry import find_schedule
from ..schedulers.static import tune_static
from .maker import LivePlanMaker, OperationShapes, PayloadShapes
from .model_graphs import ModelGraphs, pricer
from .partitioning import Given, Placements, choose_partition, paper_partition
from .planning_result import PlanningResult, describe
from .searchers import searcher_of


@dataclass(frozen=True, eq=False)
class Setting:
    """A model on a cluster with batches to plan. ``memory_limit`` bytes per rank (None: what the GPUs can use);
    ``earlier``: the batches on which partitions and static plans are chosen, which training keeps (none: they are
    chosen in hindsight, on the batches that are planned); without ``recompute`` every stage keeps all its activations,
    without ``offload`` none go to host memory; ``placements`` and ``given`` see :func:`choose_partition`."""

    model: MultimodalModel
    cluster: Cluster
    batches: tuple[GlobalBatch, ...]
    costs: Costs | None = None
    memory_limit: float | None = None
    earlier: tuple[GlobalBatch, ...] = ()
    recompute: bool = True
    offload: bool = True
    placements: Placements = field(default_factory=dict)
    given: Mapping[str, Given] = field(default_factory=dict)

    @property
    def known(self) -> tuple[GlobalBatch, ...]:
        """The batches that are known before training."""
        return self.earlier or self.batches

    @property
    def pricer(self) -> CostModel:
        return pricer(self.model, self.cluster, self.costs, self.recompute, self.offload)

    @property
    def paper_pricer(self) -> CostModel:
        """For ``dip-paper``."""
        return pricer(self.model, self.cluster, self.costs, self.recompute, self.offload, paper=True)

    @property
    def microbatches(self) -> list[Sequence[Microbatch]]:
        return [batch.microbatches for batch in self.batches]

    def graphs(self, entry: ScheduleEntry, chunks: Partition) -> ModelGraphs:
        """What prices a batch for a schedule."""
        return ModelGraphs(
            self.model, self.cluster, chunks, self.costs, self.memory_limit, self.recompute, self.offload,
            entry.paper_costs,
        )  # fmt: skip


Planner = Callable[[Sequence[Microbatch]], PlanningResult]


def make_planner(
    schedule: str | ScheduleEntry, setting: Setting, effort: Effort, given: Partition | None = None, *,
    searched: Partition | None = None, partition_seconds: float = 20.0, progress: Callable[[], None] = lambda: None,
    find: Callable[[Problem], Found] | None = None,
) -> Planner:  # fmt: skip
    """What plans one batch after the other under a schedule; all that is chosen before training is chosen here.

    ``given`` is the partition of all schedules over modality-segmented chunks; see :func:`choose_chunks`. ``find`` puts
    batches in order instead of the schedule, on its chunks. Raises UnknownScheduleError, and what the partitioner and
    the schedules raise.
    """
    entry = find_schedule(schedule) if isinstance(schedule, str) else schedule
    chunks = choose_chunks(
        entry, setting, effort, given, searched=searched, partition_seconds=partition_seconds, progress=progress
    )
    graphs = setting.graphs(entry, chunks)
    entry = entry if find is None else replace(entry, find=find)
    return lambda microbatches: plan_batch(entry, graphs, microbatches, effort, chunks.group)


def plan_batch(
    entry: ScheduleEntry, graphs: ModelGraphs, microbatches: Sequence[Microbatch], effort: Effort, group: int | None
) -> PlanningResult:
    """One batch under one schedule, on chunks that are chosen. Raises DoesNotFitError, and what the schedule raises."""
    start = time.perf_counter()
    graph = graphs.build(tuple(microbatches), forward_only=False)
    found = entry.find(Problem(graph, effort, group))
    seconds = time.perf_counter() - start
    statistics = found.statistics if entry.searches else None
    return describe(graph, found.schedule, entry.name, seconds, statistics, found.lower_bound)


def choose_chunks(
    entry: ScheduleEntry, setting: Setting, effort: Effort, given: Partition | None = None, *,
    searched: Partition | None = None, partition_seconds: float = 20.0, progress: Callable[[], None] = lambda: None,
) -> Partition:  # fmt: skip
    """The chunks that a schedule keeps through training, chosen on the batches that are known before.

    A schedule over mixed chunks tunes its own stages. One over segments takes ``given``; without it ``dip`` takes
    ``searched``, or searches for ``partition_seconds``, ``dip-paper`` follows the paper's rules, and the others take
    the better of the two. Raises what the partitioner and the schedule raise.
    """
    if entry.mixed is not None:
        known = [batch.microbatches for batch in setting.known]
        return tune_static(entry.name, setting.pricer, known, setting.memory_limit, progress)
    if given is not None:
        return given
    partitions = []
    if entry.partition != "paper":
        partitions.append(searched or searched_partition(setting, partition_seconds))
    if entry.partition != "searched":
        partitions.append(paper_partition(setting.model, setting.cluster, setting.known, costs=setting.costs))
    if len(partitions) == 1:
        return partitions[0]

    def worth(partition: Partition) -> tuple[bool, float]:
        graphs, fits, seconds = setting.graphs(entry, partition), True, 0.0
        for batch in setting.known:
            graph = graphs.build(batch.microbatches, forward_only=False)
            timeline = simulate_compiled(graph, entry.find(Problem(graph, effort)).schedule)
            fits = fits and bool(np.all(timeline.peak_bytes <= graph.memory_limit))
            seconds += timeline.iteration_time
        return not fits, seconds

    return min(partitions, key=worth)


def searched_partition(setting: Setting, seconds: float) -> Partition:
    """:func:`choose_partition` for a setting."""
    return choose_partition(
        setting.model, setting.cluster, setting.known, costs=setting.costs, memory_limit=setting.memory_limit,
        budget_seconds=seconds, placements=setting.placements, given=setting.given,
    )  # fmt: skip


def live_maker(
    entry: ScheduleEntry, graphs: ModelGraphs, shapes: PayloadShapes | OperationShapes, effort: Effort, *,
    label: str | None = None, experts: ExpertLayers = NO_EXPERTS,
) -> LivePlanMaker:  # fmt: skip
    """What plans the batches of a run under a schedule, on chunks that are chosen; picklable.

    With ``effort.evaluations`` every plan is the search's, however long it takes; without them a batch that is needed
    at once gets the greedy's. ``label`` names the plans instead of the schedule; ``experts`` are the layers in which
    coupled replicas meet.
    """
    searcher = searcher_of(entry, graphs, effort)
    return LivePlanMaker(
        replace(graphs, paper_costs=entry.paper_costs), shapes, searcher, label or entry.name,
        always_search=not entry.searches or effort.evaluations is not None, experts=experts,
    )  # fmt: skip


__all__ = [
    "DoesNotFitError",
    "Effort",
    "Planner",
    "PlanningResult",
    "Setting",
    "choose_chunks",
    "describe",
    "live_maker",
    "make_planner",
    "plan_batch",
    "searched_partition",
]  # fmt: skip
