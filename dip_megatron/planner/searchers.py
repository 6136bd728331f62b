"""Which search a run uses, by its configuration."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..config import DipConfig
from ..core import Schedule, SearchStatistics, StageGraph
from ..core.simulate import simulate_compiled
from ..schedulers import segmented_static
from .greedy import greedy, leanest
from .maker import Searcher

logger = logging.getLogger(__name__)

GAP, THRIFTY_GAP = 1e-4, 2e-3  # shares of the lower bound at which a search ends
PATIENCE = 4000  # schedules without a better one, milliseconds for small models


@dataclass(frozen=True)
class StaticSearcher:
    """The modality-segmented static order: no search."""

    def warm_up(self) -> None:
        """Nothing to do."""

    def __call__(
        self, graph: StageGraph, budget_seconds: float, on_first: Callable[[Schedule], None]
    ) -> tuple[Schedule, SearchStatistics]:
        """See :class:`planner.maker.Searcher`."""
        start = time.perf_counter()
        schedule = static_order(graph)
        return schedule, SearchStatistics(time.perf_counter() - start, 1, 0, 0)


def static_order(graph: StageGraph) -> Schedule:
    """The modality-segmented static order, with the fastest memory strategy or else the leanest. Where neither fits,
    the greedy's order: it admits no microbatch that does not. Raises NothingFitsError if that can't fit, either."""
    orders = segmented_static(graph).orders
    for strategy in (np.zeros((graph.rows, graph.ranks), dtype=np.int8), leanest(graph)):
        schedule = Schedule(orders, strategy)
        if np.all(simulate_compiled(graph, schedule).peak_bytes <= graph.memory_limit):
            return schedule
    return greedy(graph)


@dataclass(frozen=True)
class DipSearcher:
    """The searcher of ``dip plan``, within an iteration's budget. ``thrifty``: end before it when the best plan
    is about as short as any can be, or has been the best for long; for planners that share the cores that compute."""

    split_backward: bool = True
    recompute: bool = True
    offload: bool = True
    seed: int = 0
    workers: int = 1
    thrifty: bool = False

    def warm_up(self) -> None:
        """Compile the search's kernels, or load them from numba's cache."""
        from ..schedulers.dip import warm_up

        warm_up()

    def __call__(
        self, graph: StageGraph, budget_seconds: float, on_first: Callable[[Schedule], None]
    ) -> tuple[Schedule, SearchStatistics]:
        """See :class:`planner.maker.Searcher`."""
        from ..schedulers.dip import SearchOptions, search

        given = False

        def improved(schedule: Schedule, *_: object) -> None:
            nonlocal given
            if not given:
                given = True
                on_first(schedule)

        result = search(
            graph, schedule="dip", budget_seconds=budget_seconds, seed=self.seed, workers=self.workers,
            on_improved=improved,
            options=SearchOptions(
                self.split_backward, self.recompute, self.offload, gap=THRIFTY_GAP if self.thrifty else GAP,
                patience=PATIENCE if self.thrifty else None,
            ),
        )  # fmt: skip
        return result.schedule, SearchStatistics(result.seconds, result.evaluations, result.workers, self.seed)


def make_searcher(config: DipConfig, planners_here: int = 1, thrifty: bool = False) -> Searcher:
    """The searcher a configuration asks for, on a host where ``planners_here`` replicas plan. All of them together use
    at most half of the cores: the others feed the devices. ``thrifty``: the ranks compute on the cores, too."""
    if config.schedule == "static":
        return StaticSearcher()
    asked = max(config.planner_workers, 1)
    most = max(len(os.sched_getaffinity(0)) // 2 // max(planners_here, 1), 1)
    if asked > most:
        logger.warning("%d planner workers a replica would take over half of this host's cores: using %d", asked, most)
    return DipSearcher(
        config.split_backward, config.recompute, config.offload, config.search_seed, min(asked, most), thrifty
    )
