"""A schedule's entry as the searcher of a training run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..config import DipConfig
from ..core import OperationGraph, Schedule, SearchStatistics
from ..core.experts import ExpertLayers
from ..schedulers.dip.options import SearchOptions
from ..schedulers.entry import Effort, FoundSet, Problem, ScheduleEntry, SetProblem
from ..schedulers.joint.others import find_set
from .model_graphs import ModelGraphs
from .warm import warm_up_joint_search

logger = logging.getLogger(__name__)

GAP, THRIFTY_GAP = 1e-4, 2e-3  # shares of the lower bound at which a search ends
PATIENCE = 4000  # schedules without a better one, milliseconds for small models


@dataclass(frozen=True)
class EntrySearcher:
    """Puts the microbatches of one replica, or of coupled ones, in order under one entry; picklable. ``group``: see
    :class:`schedulers.entry.Problem`."""

    entry: ScheduleEntry
    effort: Effort
    group: int | None = None

    def warm_up(self, *, coupled: bool) -> None:
        """Compile the search's kernels, or load them from numba's cache."""
        if self.entry.searches:
            from ..schedulers.dip.engine import warm_up

            warm_up()
            if coupled:
                warm_up_joint_search()

    def __call__(
        self, graphs: Sequence[OperationGraph], experts: ExpertLayers, budget_seconds: float,
        on_first: Callable[[Sequence[Schedule]], None],
    ) -> FoundSet:  # fmt: skip
        """See :class:`planner.maker.Searcher`."""
        effort = replace(self.effort, budget_seconds=budget_seconds)
        if len(graphs) > 1:
            found = find_set(self.entry, SetProblem(tuple(graphs), experts, effort, self.group, on_first))
        else:
            problem = Problem(graphs[0], effort, self.group, lambda schedule: on_first([schedule]))
            one = self.entry.find(problem)
            found = FoundSet((one.schedule,), one.statistics, one.lower_bound)
        return found if found.statistics is not None else replace(found, statistics=SearchStatistics())


def searcher_of(entry: ScheduleEntry, graphs: ModelGraphs, effort: Effort) -> EntrySearcher:
    """The searcher of an entry on the chunks that ``graphs`` price."""
    return EntrySearcher(entry, effort, graphs.chunks.group)


def live_effort(config: DipConfig, planners_here: int = 1, thrifty: bool = False) -> Effort:
    """What a configuration lets a search spend, on a host where ``planners_here`` replicas plan. All of them together
    use at most half of the cores: the others feed the devices. ``thrifty``: the ranks compute on the cores, too; the
    search ends when its best plan is about as short as any can be, or has been the best for long."""
    asked = max(config.planner_workers, 1)
    most = max(len(os.sched_getaffinity(0)) // 2 // max(planners_here, 1), 1)
    if asked > most:
        logger.warning("%d planner workers a replica would take over half of this host's cores: using %d", asked, most)
    return Effort(
        workers=min(asked, most), seed=config.search_seed, evaluations=config.search_evaluations,
        deterministic=config.search_evaluations is not None,
        options=SearchOptions(
            config.split_backward, config.recompute, config.offload, gap=THRIFTY_GAP if thrifty else GAP,
            patience=PATIENCE if thrifty else None,
        ),
    )  # fmt: skip
