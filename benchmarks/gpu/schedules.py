"""All schedules of a benchmark, planned with the same measured costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dip_megatron.describe.model import Partition
from dip_megatron.planner.facade import Effort, PlanningResult, describe, make_planner, searched_partition
from dip_megatron.planner.facade import Setting as Planning
from dip_megatron.planner.partitioning import paper_partition
from dip_megatron.schedulers.dip.options import SearchOptions
from dip_megatron.schedulers.entry import MixedChunks  # fmt: skip
from dip_megatron.schedulers.registry import find_schedule, register_schedule  # fmt: skip
from dip_megatron.schedulers.static import static_plan, tune_static  # fmt: skip

Log = Callable[[str], None]

# What Megatron does without a cost model: one stage a rank, of equal parameters.
register_schedule(
    replace(
        find_schedule("megatron-1f1b"), name="megatron-1f1b-by-parameters",
        mixed=MixedChunks((1,), by_parameters=True, groups=False),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A schedule with a plan for each batch: over static mixed stages (``choice``) or over segments (``partition``).
    ``failure`` says why there is none."""

    name: str
    planned: tuple[PlanningResult, ...] = ()
    choice: Partition | None = None
    partition: Partition | None = None
    failure: str = ""

    def describe(self) -> str:
        """Where the layers are, in a line."""
        if self.choice is not None:
            return self.choice.explain()
        if self.partition is not None:
            return "; ".join(f"{m.module} {m.layers} units of {m.unit_size or 'all'}" for m in self.partition.modules)
        return self.failure


def plan_all(
    names: Sequence[str], planning: Planning, effort: Effort, partition_seconds: float, log: Log
) -> list[Candidate]:
    """Plan every batch under every schedule; one that fails is reported, the others go on."""
    found = []
    for name in names:
        try:
            candidate = _plan(name, planning, effort, partition_seconds)
        except ValueError as error:
            candidate = Candidate(name, failure=" ".join(str(error).split()))
        seconds = [p.iteration_time for p in candidate.planned]
        mean = f"{sum(seconds) / len(seconds):.3f} s predicted; " if seconds else "failed: "
        log(f"{name}: {mean}{candidate.describe()}")
        found.append(candidate)
    return found


def _plan(name: str, planning: Planning, effort: Effort, partition_seconds: float) -> Candidate:
    if find_schedule(name).mixed is not None:
        choice = tune_static(name, planning.pricer, planning.microbatches, planning.memory_limit)
        planned = []
        for batch in planning.microbatches:
            graph, fitted = static_plan(planning.pricer, choice, batch, planning.memory_limit)
            planned.append(describe(graph, fitted.schedule, name, 0.0))
        _check_fits(planned)
        return Candidate(name, tuple(planned), choice=choice)
    if name == "dip-paper":
        partition = paper_partition(planning.model, planning.cluster, planning.batches, costs=planning.costs)
    else:
        partition = searched_partition(planning, partition_seconds)
    planner = make_planner(name, planning, effort, partition)
    return Candidate(name, tuple(planner(batch) for batch in planning.microbatches), partition=partition)


def _check_fits(planned: Sequence[PlanningResult]) -> None:
    over = [max(p.peak_bytes) for p in planned if not p.fits]
    if over:
        raise ValueError(f"does not fit even with everything recomputed: {max(over) / 1e9:.1f} GB on a rank")


def effort_of(search_seconds: float, workers: int, offload: bool = False) -> Effort:
    """What the searches may spend on one plan."""
    return Effort(search_seconds, workers, options=SearchOptions(offload=offload))
