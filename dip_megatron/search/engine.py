"""The anytime search behind ``--schedule dip``: greedy portfolio, annealing on keys, local search over sequences."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..schedule.bounds import lower_bound
from ..schedule.graph import ModalityModule, StageGraph, Unit
from ..schedule.order import Schedule, check_complete
from ..simulate.kernels import GraphArrays, simulate_compiled
from .annealing import MAY, MAY_LEAN, MAY_REORDER, MAY_SPLIT, anneal
from .dispatch import Keys, Work, copy_keys, dispatch, make_work
from .feasibility import check_fits
from .natural import megatron_orders
from .options import SearchOptions, SearchResult
from .portfolio import portfolio
from .problem import Problem, make_problem
from .random import seeded
from .strategies import restore, restrict

Improved = Callable[[Schedule, float], None]

CHAINS = 4  # of a deterministic search, whatever the number of workers
PORTFOLIO_SHARE = 0.4  # of the budget at most
KEYS_SHARE = 0.7
HOT, COLD = 1e-3, 2e-5  # temperature over iteration time, at the start and at the end
SLICE_SECONDS = 0.01


class Incumbent:
    """The best schedule so far, shared by all workers of one search. Times are those of the simulator."""

    def __init__(
        self, graph: StageGraph, arrays: GraphArrays, on_improved: Improved | None, origin: NDArray[np.int8] | None
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
        with self.lock:
            self.evaluations += evaluations


def listed(q: Problem, w: Work) -> Schedule:
    """The schedule that :func:`dispatch` left in ``w``."""
    rows, ranks = q.graph.rows, q.graph.ranks
    orders = tuple(w.orders[p, : w.lengths[p]].copy() for p in range(ranks))
    return Schedule(orders, w.strategy.reshape(rows, ranks).copy())


class KeyChain:
    """One annealing walk over keys, stepped in slices."""

    def __init__(
        self, q: Problem, keys: Keys, keys_time: float, options: SearchOptions, seed: int, stream: int
    ) -> None:
        self.q = q
        self.current, self.trial, self.best = copy_keys(keys), copy_keys(keys), copy_keys(keys)
        self.values = np.array([keys_time, keys_time])
        self.random = seeded(seed, stream)
        self.work = make_work(q)
        self.may = np.zeros(MAY, dtype=np.bool_)
        self.may[MAY_REORDER] = options.reorder
        self.may[MAY_SPLIT] = options.split_backward
        self.may[MAY_LEAN] = q.graph.candidates > 1 and bool(q.bounded.any())

    @property
    def time(self) -> float:
        return float(self.values[1])

    def step(self, progress: float, evaluations: int) -> None:
        heat = self.time * HOT * (COLD / HOT) ** progress
        anneal(
            self.q,
            self.current,
            self.trial,
            self.best,
            self.work,
            self.may,
            self.random,
            self.values,
            heat,
            evaluations,
        )

    def adopt(self, keys: Keys, keys_time: float) -> None:
        """Go on from another walk's best."""
        self.current, self.best = copy_keys(keys), copy_keys(keys)
        self.values[:] = keys_time

    def schedule(self) -> Schedule:
        dispatch(self.q, self.best, self.work, np.inf)
        return listed(self.q, self.work)


def greedy(
    q: Problem, incumbent: Incumbent, options: SearchOptions, deadline: float, most: int | None
) -> list[tuple[float, Keys]]:
    """Run the portfolio until ``deadline`` (seconds since the start) or ``most`` schedules, at least one; all it tried,
    best first."""
    work = make_work(q)
    tried: list[tuple[float, Keys]] = []
    for keys in portfolio(q, split=options.split_backward, reorder=options.reorder):
        keys_time = dispatch(q, keys, work, np.inf)
        if not np.isfinite(keys_time):
            raise RuntimeError("the list scheduler ran out of memory although every microbatch fits alone")
        if keys_time < incumbent.keys_time:
            incumbent.offer(listed(q, work))
            incumbent.offer_keys(keys, keys_time)
        tried.append((keys_time, keys))
        if incumbent.elapsed() > deadline or len(tried) == most:
            break
    incumbent.count(len(tried))
    tried.sort(key=lambda entry: entry[0])
    return tried


def run_timed(chain: KeyChain, incumbent: Incumbent, until: float, most: int | None, good_enough: float) -> None:
    """Step ``chain`` until ``until`` (seconds since the start), ``most`` evaluations of the whole search, or a time of
    at most ``good_enough``; share improvements, and start over from the best where it has fallen behind."""
    slice_size = 8
    began = incumbent.elapsed()
    adopted = 0
    while incumbent.time > good_enough:
        now = incumbent.elapsed()
        if now >= until or (most is not None and incumbent.evaluations >= most):
            return
        progress = (now - began) / max(until - began, 1e-9)
        if most is not None:
            progress = max(progress, incumbent.evaluations / most)
            slice_size = min(slice_size, most - incumbent.evaluations)
        before = chain.time
        chain.step(min(progress, 1.0), slice_size)
        incumbent.count(slice_size)
        if chain.time < before and chain.time < incumbent.keys_time:
            incumbent.offer(chain.schedule())
            incumbent.offer_keys(chain.best, chain.time)
        elif int(progress * 5) > adopted:
            adopted = int(progress * 5)
            with incumbent.lock:
                if incumbent.keys is not None and incumbent.keys_time < chain.time:
                    chain.adopt(incumbent.keys, incumbent.keys_time)
        spent = incumbent.elapsed() - now
        slice_size = max(1, min(int(slice_size * min(2.0, SLICE_SECONDS / max(spent, 1e-6))), 10_000))


def search(
    graph: StageGraph,
    *,
    schedule: str = "dip",
    budget_seconds: float,
    seed: int = 0,
    evaluations: int | None = None,
    workers: int = 1,
    deterministic: bool = False,
    warm_start: Schedule | None = None,
    on_improved: Improved | None = None,
    options: SearchOptions | None = None,
) -> SearchResult:
    """The best schedule of ``graph`` found within ``budget_seconds`` (or ``evaluations`` list schedules, if given).

    ``schedule``: "dip" or "dip-paper" (the paper's three phases). ``workers`` threads search in parallel, outside
    Python's lock. ``deterministic``: the result depends on ``seed`` and ``evaluations`` (then needed) alone, not on
    time or workers. ``warm_start``: a schedule of this very graph to start from. ``on_improved(schedule, seconds)`` is
    called for the first valid schedule and each better one, from any worker, one at a time.

    Never slower than Megatron's own order of the same chunks, if that fits. Raises DoesNotFitError if nothing fits in
    memory, ValueError for arguments that make no sense.
    """
    options = options or SearchOptions()
    if schedule not in ("dip", "dip-paper"):
        raise ValueError(f"unknown schedule {schedule!r} to search for; choose dip or dip-paper")
    if deterministic and evaluations is None:
        raise ValueError("a deterministic search needs a number of evaluations; a time limit would not repeat")
    if workers < 1 or budget_seconds < 0 or (evaluations is not None and evaluations < 1):
        raise ValueError("a search needs at least one worker, one evaluation and a budget that is not negative")
    return _search_dip(
        graph, budget_seconds, seed, evaluations, workers, deterministic, warm_start, on_improved, options
    )


def _search_dip(
    graph: StageGraph, budget: float, seed: int, evaluations: int | None, workers: int, deterministic: bool,
    warm_start: Schedule | None, on_improved: Improved | None, options: SearchOptions,
) -> SearchResult:  # fmt: skip
    origin = None
    searched = graph
    if graph.candidates > 1 and not (options.recompute and options.offload):
        searched, origin = restrict(graph, recompute=options.recompute, offload=options.offload)
    q = make_problem(searched)
    incumbent = Incumbent(searched, q.graph, on_improved, origin)
    check_fits(searched, q)
    if warm_start is not None:
        fault = check_complete(graph, warm_start)
        if fault is not None:
            raise ValueError(f"the warm start is no schedule of this graph: {fault}")
        if origin is None and np.all(simulate_compiled(graph, warm_start, q.graph).peak_bytes <= graph.memory_limit):
            incumbent.offer(warm_start)
    until = np.inf if deterministic else budget
    starts = greedy(q, incumbent, options, until * PORTFOLIO_SHARE, evaluations)
    for _, order in megatron_orders(searched, q.graph):
        incumbent.offer(order)
    bound = lower_bound(graph, split=options.split_backward)
    good_enough = bound * (1.0 + options.gap)
    if deterministic:
        each = ((evaluations or 0) - incumbent.evaluations) // CHAINS
        chains = [
            KeyChain(q, starts[i % len(starts)][1], starts[i % len(starts)][0], options, seed, i) for i in range(CHAINS)
        ]
        _in_threads([_counted_run(chain, incumbent, each) for chain in chains], workers)
        for chain in chains:
            incumbent.offer(chain.schedule())
    else:
        chains = [KeyChain(q, starts[0][1], starts[0][0], options, seed, i) for i in range(workers)]
        _in_threads([_timed_run(chain, incumbent, until, evaluations, good_enough) for chain in chains], workers)
    assert incumbent.schedule is not None
    return SearchResult(
        incumbent.outward(incumbent.schedule), incumbent.time, bound, incumbent.evaluations, incumbent.elapsed(),
        tuple(incumbent.history), workers, seed,
    )  # fmt: skip


def _counted_run(chain: KeyChain, incumbent: Incumbent, evaluations: int) -> Callable[[], None]:
    def run() -> None:
        slices = 50
        for i in range(slices):
            count = evaluations * (i + 1) // slices - evaluations * i // slices
            chain.step(i / slices, count)
            incumbent.count(count)

    return run


def _timed_run(
    chain: KeyChain, incumbent: Incumbent, until: float, most: int | None, good_enough: float
) -> Callable[[], None]:
    return lambda: run_timed(chain, incumbent, until, most, good_enough)


def _in_threads(jobs: list[Callable[[], None]], workers: int) -> None:
    """Run all jobs, the first in this thread; the first exception of any is raised."""
    if workers == 1 or len(jobs) == 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


def warm_up() -> None:
    """Load or compile the kernels, so that the first search of a process is as fast as the others (seconds on the first
    use after installation, well under one later)."""
    one, none = np.ones((1, 1, 1)), np.zeros((1, 1, 1))
    graph = StageGraph(
        1, (ModalityModule("warm", ((1,),)),), (Unit(0, "warm", 0),), one, one, one, 2 * one, one, none, np.zeros(1),
        np.zeros(1), np.full(1, 1.0),
    )  # fmt: skip
    search(graph, budget_seconds=60.0, evaluations=100, options=SearchOptions(gap=-1.0))
