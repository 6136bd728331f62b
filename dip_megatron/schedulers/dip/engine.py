"""The anytime search behind ``--schedule dip``: greedy portfolio, annealing on keys, local search over sequences."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np

from ...core.bounds import lower_bound
from ...core.graph import OperationGraph
from ...core.order import Schedule, check_complete
from ...core.simulate.kernels import simulate_compiled
from ...core.warm import tight_graph
from .annealing import MAY, MAY_LEAN, MAY_REORDER, MAY_SPLIT, anneal
from .feasibility import check_fits
from .incumbent import Improved, Incumbent, in_threads, listed
from .keys import ALTERNATE, Keys, copy_keys
from .memory import evaluate, make_refill
from .natural import megatron_orders
from .options import SearchOptions, SearchResult
from .paper import search_paper
from .portfolio import levels, nested, variations
from .prices import refine_strategies
from .problem import Problem, make_problem
from .random import seeded
from .sequences import begin, improve, make_sequences
from .strategies import restrict
from .work import make_work

CHAINS = 4  # of a deterministic search, whatever the number of workers
NESTED_ROUNDS, NESTED_DRAWS = 8, 64
PORTFOLIO_SHARE = 0.4  # of the budget at most
KEYS_SHARE = 0.4
HOT, COOL, COLD = 1e-3, 3e-4, 2e-5  # temperature over iteration time: of keys and of sequences at first, at last
SLICE_SECONDS = 0.01
LEAST_GAIN = 1e-4  # share of the iteration time; a patient search waits for no less


class KeyChain:
    """One annealing walk over keys, stepped in slices."""

    def __init__(
        self, q: Problem, keys: Keys, keys_time: float, options: SearchOptions, seed: int, stream: int
    ) -> None:
        self.q = q
        self.current, self.trial, self.best = copy_keys(keys), copy_keys(keys), copy_keys(keys)
        self.values = np.array([keys_time, keys_time])
        self.random = seeded(seed, stream)
        self.work, self.refill = make_work(q), make_refill(q)
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
            self.refill,
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
        evaluate(self.q, self.best, self.work, self.refill, np.inf)
        return listed(self.q, self.work)


class SequenceChain:
    """One walk over explicit orders, stepped in slices."""

    def __init__(self, q: Problem, schedule: Schedule, seed: int, stream: int) -> None:
        self.q, self.random, self.values = q, seeded(seed, CHAINS + stream), np.zeros(2)
        self.adopt(schedule)

    @property
    def time(self) -> float:
        return float(self.values[1])

    def step(self, progress: float, evaluations: int) -> None:
        heat = self.time * COOL * (COLD / COOL) ** progress
        improve(self.q, self.sequences, self.random, self.values, heat, evaluations)

    def adopt(self, schedule: Schedule) -> None:
        """Go on from another walk's best."""
        self.sequences = make_sequences(self.q, schedule)
        self.values[:] = begin(self.q, self.sequences, self.random)

    def schedule(self) -> Schedule:
        s = self.sequences
        orders = tuple(s.best_orders[p, : s.lengths[p]].copy() for p in range(self.q.graph.ranks))
        return Schedule(orders, s.best_strategy.reshape(self.q.graph.virtual_microbatches, self.q.graph.ranks).copy())


def greedy(
    q: Problem, incumbent: Incumbent, options: SearchOptions, deadline: float, most: int | None
) -> list[tuple[float, Keys]]:
    """Run the portfolio until ``deadline`` (seconds since the start) or ``most`` schedules, at least one; all it tried,
    best first."""
    work, refill = make_work(q), make_refill(q)
    tried: list[tuple[float, Keys]] = []

    def attempt(candidates: Iterator[Keys]) -> None:
        for keys in candidates:
            if tried and (incumbent.elapsed() > deadline or len(tried) == most):
                return
            keys_time = evaluate(q, keys, work, refill, np.inf)
            if not np.isfinite(keys_time):
                raise RuntimeError("the list scheduler ran out of memory although every microbatch fits alone")
            if keys_time < incumbent.keys_time:
                incumbent.offer(listed(q, work))
                incumbent.offer_keys(keys, keys_time)
            tried.append((keys_time, keys))

    attempt(levels(q, split=options.split_backward))
    if options.reorder and q.groups > 2:
        # As long as that pays: where all microbatches are alike, the natural order has been better.
        draws, natural = nested(q, split=options.split_backward), min(tried, key=lambda entry: entry[0])[0]
        for _ in range(NESTED_ROUNDS):
            attempt(itertools.islice(draws, NESTED_DRAWS))
            if incumbent.keys_time >= natural:
                break
    attempt(variations(q, min(tried, key=lambda entry: entry[0])[1], reorder=options.reorder))
    incumbent.count(len(tried))
    tried.sort(key=lambda entry: entry[0])
    return tried


def run_timed(
    chain: KeyChain | SequenceChain, incumbent: Incumbent, until: float, most: int | None, good_enough: float,
    patience: int | None = None,
) -> None:  # fmt: skip
    """Step ``chain`` until ``until`` (seconds since the start), ``most`` evaluations of the whole search, a time of at
    most ``good_enough``, or ``patience`` evaluations without a better schedule; share improvements, and start over from
    the best where it has fallen behind."""
    slice_size = 8 if until - incumbent.elapsed() > 10 * SLICE_SECONDS else 1
    began, counted = incumbent.elapsed(), incumbent.evaluations
    adopted = 0
    best, found = incumbent.time, counted
    while incumbent.time > good_enough:
        now = incumbent.elapsed()
        if incumbent.time < best * (1.0 - LEAST_GAIN):
            best, found = incumbent.time, incumbent.evaluations
        if patience is not None:
            if incumbent.evaluations - found >= patience:
                return
            slice_size = min(slice_size, max(1, patience // 8))
        if now >= until or (most is not None and incumbent.evaluations >= most):
            return
        progress = (now - began) / max(until - began, 1e-9)
        if most is not None:
            progress = max(progress, (incumbent.evaluations - counted) / max(1, most - counted))
            slice_size = max(1, min(slice_size, most - incumbent.evaluations))
        before = chain.time
        chain.step(min(progress, 1.0), slice_size)
        incumbent.count(slice_size)
        if chain.time < before and chain.time < incumbent.time:
            incumbent.offer(chain.schedule())
        if isinstance(chain, KeyChain):
            if chain.time < before:
                incumbent.offer_keys(chain.best, chain.time)
            elif progress > 0.5 and int(progress * 8) > adopted:
                adopted = int(progress * 8)
                with incumbent.lock:
                    if incumbent.keys is not None and incumbent.keys_time < chain.time:
                        chain.adopt(incumbent.keys, incumbent.keys_time)
        elif int(progress * 8) > adopted:
            adopted = int(progress * 8)
            _refine(chain.q, incumbent)
            if incumbent.schedule is not None and incumbent.time < chain.time * (1.0 - 1e-4):
                chain.adopt(incumbent.schedule)
        spent = incumbent.elapsed() - now
        slice_size = max(1, min(int(slice_size * min(2.0, SLICE_SECONDS / max(spent, 1e-6))), 10_000))


def search(
    graph: OperationGraph,
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
    origin = None
    searched = graph
    if graph.candidates > 1 and not (options.recompute and options.offload):
        searched, origin = restrict(graph, recompute=options.recompute, offload=options.offload)
    q = make_problem(searched)
    incumbent = Incumbent(searched, q.graph, on_improved, origin)
    check_fits(searched, q)
    if warm_start is not None:
        _check_warm_start(graph, warm_start)
        if origin is None:
            incumbent.offer(warm_start)
    until = np.inf if deterministic else budget_seconds
    if schedule == "dip":
        bound = _search_dip(searched, q, incumbent, until, evaluations, workers, seed, deterministic, options)
    else:
        bound = lower_bound(graph, split=False)
        search_paper(searched, q, incumbent, bound, until, evaluations, 1 if deterministic else workers, seed)
    assert incumbent.schedule is not None
    return SearchResult(
        schedule=incumbent.outward(incumbent.schedule),
        iteration_time=incumbent.time,
        lower_bound=bound,
        evaluations=incumbent.evaluations,
        seconds=incumbent.elapsed(),
        history=tuple(incumbent.history),
        workers=workers,
        seed=seed,
    )


def _check_warm_start(graph: OperationGraph, schedule: Schedule) -> None:
    fault = check_complete(graph, schedule)
    if fault is not None:
        raise ValueError(f"the warm start is no schedule of this graph: {fault}")
    over = simulate_compiled(graph, schedule).peak_bytes - graph.memory_limit
    if np.any(over > 0):
        raise ValueError(f"the warm start is {over.max():.0f} bytes over the limit on rank {int(np.argmax(over))}")


def _search_dip(
    graph: OperationGraph, q: Problem, incumbent: Incumbent, until: float, evaluations: int | None, workers: int, seed:
    int, deterministic: bool, options: SearchOptions,
) -> float:  # fmt: skip
    """Fill ``incumbent``; returns the lower bound."""
    starts = greedy(q, incumbent, options, until * PORTFOLIO_SHARE, evaluations)
    for _, order in megatron_orders(graph, q.graph):
        incumbent.offer(order)
    _refine(q, incumbent)
    bound = lower_bound(graph, split=options.split_backward)
    good_enough = bound * (1.0 + options.gap)
    rest = (evaluations or 0) - incumbent.evaluations
    share = KEYS_SHARE if options.sequences else 1.0
    if deterministic:
        chosen = _apart(starts, CHAINS)
        walks = [KeyChain(q, keys, keys_time, options, seed, i) for i, (keys_time, keys) in enumerate(chosen)]
        in_threads([partial(_run_counted, walk, int(rest * share) // CHAINS) for walk in walks], workers)
        for walk in walks:
            incumbent.offer(walk.schedule())
        _refine(q, incumbent)
        if options.sequences and incumbent.schedule is not None:
            steps = [SequenceChain(q, incumbent.schedule, seed, i) for i in range(CHAINS)]
            in_threads([partial(_run_counted, step, (rest - int(rest * share)) // CHAINS) for step in steps], workers)
            for step in steps:
                incumbent.offer(step.schedule())
        incumbent.count(max(0, rest))
        return bound
    chosen = _apart(starts, workers)
    walks = [KeyChain(q, keys, keys_time, options, seed, i) for i, (keys_time, keys) in enumerate(chosen)]
    most = None if evaluations is None else incumbent.evaluations + int(rest * share)
    began, before = incumbent.elapsed(), incumbent.time
    keys_until = began + share * (until - began)
    in_threads(
        [partial(run_timed, walk, incumbent, keys_until, most, good_enough, options.patience) for walk in walks],
        workers,
    )
    if incumbent.time < before:
        _refine(q, incumbent)
    if options.sequences and incumbent.schedule is not None:
        steps = [SequenceChain(q, incumbent.schedule, seed, i) for i in range(workers)]
        in_threads(
            [partial(run_timed, step, incumbent, until, evaluations, good_enough, options.patience) for step in steps],
            workers,
        )
    return bound


def _refine(q: Problem, incumbent: Incumbent) -> None:
    """Choose the best schedule's memory strategies again, if memory costs it anything."""
    best = incumbent.schedule
    if best is not None and best.strategy.any():
        incumbent.offer(refine_strategies(q, best))


def _apart(starts: list[tuple[float, Keys]], count: int) -> list[tuple[float, Keys]]:
    """``count`` starts: the best of each window and way of taking turns, with units held back and without, best first,
    then the best again."""
    seen: dict[tuple[int, bool, bool], tuple[float, Keys]] = {}
    for keys_time, keys in starts:
        kind = int(keys.window[0]), bool(keys.flags[ALTERNATE]), bool(keys.release.any())
        seen.setdefault(kind, (keys_time, keys))
    best = list(seen.values())[:count]
    return best + [starts[0]] * (count - len(best))


def _run_counted(chain: KeyChain | SequenceChain, evaluations: int) -> None:
    slices = 50
    for i in range(slices):
        chain.step(i / slices, max(0, evaluations) * (i + 1) // slices - max(0, evaluations) * i // slices)


def warm_up() -> None:
    """Load or compile the kernels, so that the first search of a process is as fast as the others (seconds on the first
    use after installation, well under one later)."""
    graph, options = tight_graph(), SearchOptions(gap=-1.0)
    for schedule in ("dip", "dip-paper"):  # enough tries for all stages of a search
        found = search(graph, schedule=schedule, budget_seconds=600.0, evaluations=1000, options=options).schedule
    refine_strategies(make_problem(graph), Schedule(found.orders, np.ones_like(found.strategy)))
