"""What a schedule is to the rest of the package: a problem in, an order out, and words that say what it needs.

``docs/add-a-schedule.md`` builds one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..core.experts import ExpertLayers
from ..core.graph import OperationGraph
from ..core.order import Schedule
from ..core.plan import SearchStatistics
from .dip.options import SearchOptions

if TYPE_CHECKING:
    from ..describe.model import MultimodalModel


def _ignore(_: Schedule) -> None:
    """Nobody waits for a first schedule."""


def _runs_anything(model: MultimodalModel, microbatches: int) -> str | None:
    """Nothing is refused."""
    return None


@dataclass(frozen=True)
class Effort:
    """What a search may spend: seconds, threads, and, for a result that repeats, a number of evaluations.

    ``deterministic``: the result depends on ``seed`` and ``evaluations`` alone.
    """

    budget_seconds: float = 1.0
    workers: int = 1
    seed: int = 0
    evaluations: int | None = None
    deterministic: bool = False
    options: SearchOptions = field(default_factory=SearchOptions)


@dataclass(frozen=True, eq=False)
class Problem:
    """One batch to put in order: the priced ``graph`` of its stages, and what may be spent on it.

    ``group``: Megatron's microbatch group size that was chosen with the chunks (None: the schedule's own choice).
    ``on_first`` takes the first valid schedule of a search that goes on.
    """

    graph: OperationGraph
    effort: Effort = field(default_factory=Effort)
    group: int | None = None
    on_first: Callable[[Schedule], None] = _ignore


@dataclass(frozen=True, eq=False)
class Found:
    """A schedule of a problem's graph. ``lower_bound`` (seconds) if the search has proven one."""

    schedule: Schedule
    statistics: SearchStatistics | None = None
    lower_bound: float | None = None


def _ignore_set(_: Sequence[Schedule]) -> None:
    """Nobody waits for first schedules."""


@dataclass(frozen=True, eq=False)
class SetProblem:
    """One batch of coupled replicas to put in order: a :class:`Problem` with a graph for each replica.

    Attributes:
        graphs: One priced graph a replica, two at least.
        experts: The layers in which the replicas meet.
        effort: What may be spent.
        group: Megatron's microbatch group size that was chosen with the chunks; None leaves it to the schedule.
        on_first: Takes the first valid schedules of a search that goes on.
    """

    graphs: tuple[OperationGraph, ...]
    experts: ExpertLayers
    effort: Effort = field(default_factory=Effort)
    group: int | None = None
    on_first: Callable[[Sequence[Schedule]], None] = _ignore_set


@dataclass(frozen=True, eq=False)
class FoundSet:
    """``schedules[replica]`` of a :class:`SetProblem`. ``lower_bound``: seconds, if the search has proven any."""

    schedules: tuple[Schedule, ...]
    statistics: SearchStatistics | None = None
    lower_bound: float | None = None


@dataclass(frozen=True)
class MixedChunks:
    """How chunks that mix modalities are chosen before training: layers of all modules one after the other, cut into
    virtual stages, one unit per microbatch, as any static pipeline of the whole model does.

    ``segments``: how many virtual stages a rank may have. ``turned``: two of them, the second one from the last rank
    back to the first. ``by_parameters``: cut into equal parameters rather than equal latencies. ``groups``: Megatron's
    larger microbatch groups are tried, too. ``on_mean``: judged by the mean of the known batches alone. ``encoders``:
    modules before the last one are ``cut`` between any two layers, stand ``whole`` on the first stage, or ``apart``, on
    stages that hold nothing of the last one.
    """

    segments: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    turned: bool = False
    by_parameters: bool = False
    groups: bool = True
    on_mean: bool = False
    encoders: Literal["cut", "whole", "apart"] = "cut"


@dataclass(frozen=True)
class ScheduleEntry:
    """A schedule by name.

    ``find`` puts a problem in order; it raises BaselineError for one that it can't run. ``summary`` is a line for
    people. ``mixed`` None: chunks hold layers of one module each, and a partition says which and how microbatches are
    cut into units: the ``searched`` one, the ``paper``'s rules, or the ``better`` of the two. ``refusal`` says in words
    why a model can't be trained with so many microbatches an iteration under this schedule, None if it can.
    ``paper_costs``: planned with the memory strategies that the DIP paper describes. ``ahead``: takes long enough to be
    planned in a worker while the iteration before runs; ``find`` must then be importable there. ``searches``: spends
    the budget it is given. ``find_set`` puts the batches of coupled replicas in order together; None: all of them run
    what ``find`` gives for the most work in every place.
    """

    name: str
    summary: str
    find: Callable[[Problem], Found]
    mixed: MixedChunks | None = None
    partition: Literal["searched", "paper", "better"] = "better"
    refusal: Callable[[MultimodalModel, int], str | None] = _runs_anything
    paper_costs: bool = False
    ahead: bool = True
    searches: bool = False
    find_set: Callable[[SetProblem], FoundSet] | None = None


@dataclass(frozen=True)
class LeastRecompute:
    """Makes a ``find`` of the orders that a static schedule offers for a problem whose graph has one memory strategy
    per stage: the fastest of them with the least recompute, the same for all stages, that fits."""

    orders: Callable[[Problem], Sequence[Schedule]]

    def __call__(self, problem: Problem) -> Found:
        """See :class:`ScheduleEntry`."""
        from .fit import least_recompute

        start = time.perf_counter()

        def build(graph: OperationGraph) -> Sequence[Schedule]:
            return self.orders(Problem(graph, problem.effort, problem.group))

        fitted = least_recompute(problem.graph, build)
        return Found(fitted.schedule, SearchStatistics(time.perf_counter() - start, 1, 1, 0))
