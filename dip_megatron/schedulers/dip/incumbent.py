"""The best schedule of one search, shared by its workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ...core.graph import OperationGraph
from ...core.order import Schedule
from ...core.simulate.kernels import GraphArrays, simulate_compiled
from .keys import Keys, copy_keys
from .problem import Problem
from .strategies import restore
from .work import Work

Improved = Callable[[Schedule, float], None]


class Incumbent:
    """The best schedule so far, by the simulator, and the best keys. ``origin`` maps strategies back to the caller's
    graph, if some were left out (see :func:`.strategies.restrict`)."""

    def __init__(
        self, graph: OperationGraph, arrays: GraphArrays, on_improved: Improved | None, origin: NDArray[np.int8] | None
    ) -> None:
        self.graph, self.arrays, self.on_improved, self.origin = graph, arrays, on_improved, origin
        self.start = time.perf_counter()
        self.time = np.inf
        self.schedule: Schedule | None = None
        self.keys: Keys | None = None
        self.keys_time = np.inf
        self.history: list[tuple[float, float]] = []
        self.evaluations = 0
        self.lock = threading.Lock()

    def elapsed(self) -> float:
        """Seconds since the search began."""
        return time.perf_counter() - self.start

    def offer(self, schedule: Schedule) -> float:
        """Take ``schedule`` if it is faster than the best; returns its iteration time (seconds)."""
        timeline = simulate_compiled(self.graph, schedule, self.arrays)
        with self.lock:
            if timeline.iteration_time < self.time:
                self.time, self.schedule = timeline.iteration_time, schedule
                self.history.append((self.elapsed(), self.time))
                if self.on_improved is not None:
                    self.on_improved(self.outward(schedule), self.time)
        return timeline.iteration_time

    def outward(self, schedule: Schedule) -> Schedule:
        """``schedule`` with the candidates of the caller's graph."""
        return schedule if self.origin is None else Schedule(schedule.orders, restore(schedule.strategy, self.origin))

    def offer_keys(self, keys: Keys, keys_time: float) -> None:
        """Remember the best keys, for workers that have fallen behind."""
        with self.lock:
            if keys_time < self.keys_time:
                self.keys, self.keys_time = copy_keys(keys), keys_time

    def count(self, evaluations: int) -> None:
        """Add to the number of schedules tried."""
        with self.lock:
            self.evaluations += evaluations


def listed(q: Problem, w: Work) -> Schedule:
    """The schedule that the list scheduler left in ``w``."""
    virtual_microbatches, ranks = q.graph.virtual_microbatches, q.graph.ranks
    orders = tuple(w.orders[p, : w.lengths[p]].copy() for p in range(ranks))
    return Schedule(orders, w.strategy.reshape(virtual_microbatches, ranks).copy())


def in_threads(jobs: Sequence[Callable[[], None]], workers: int) -> None:
    """Run all jobs; the first exception of any is raised."""
    if workers == 1 or len(jobs) == 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()
