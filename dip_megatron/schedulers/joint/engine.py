"""The search for plans of coupled replicas: pairings, a skeleton on the maxima, then each replica's own around it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ...core.bounds import lower_bound
from ...core.experts import ExpertLayers
from ...core.graph import OperationGraph
from ...core.lower import make_plan_set
from ...core.operations import Kind
from ...core.order import Schedule
from ...core.plan import SearchStatistics
from ...core.plan_set import PlanSet
from ...core.simulate import fit_in_memory, simulate_set_compiled
from ..dip.engine import search
from ..dip.feasibility import DoesNotFitError
from ..dip.incumbent import in_threads
from ..dip.options import SearchOptions
from .chain import JointChain, make_joint_problem
from .pairing import Slots, pairings
from .sequences import JointProblem
from .together import Together, leanest, together

TRIAL = 48
"""List schedules tried on each pairing before one is chosen."""
PAIRINGS = 3
"""On which skeletons are searched: which of them is the best is known once operations are packed, not before."""
STARTS, WALKS = 16, 3
"""Skeletons that are searched on these pairings, and walks from those that are fastest once packed."""
PAIRING_SHARE, SKELETON_SHARE, FIRST_SHARE = 0.2, 0.12, 0.6
"""Of the budget, at most: choosing pairings, their skeletons, and first walks over all replicas' orders; the rest goes
to a walk from the best of them."""
TIMED_SHARE = 0.4
"""Of a budget in seconds: the skeletons. Schedules of one of them take longer to try than changes of a walk."""
LEAST_TRIES = 0.6
"""Fewer skeletons are searched where each would have fewer schedules than this for every stage of a replica."""
PARTS = 8
"""Parts of a walk, after each of which walks that have fallen behind start over from the fastest."""
SLICE_SECONDS = 0.02
PACKING_REST, KICK_REST = 10.0, 2.0
"""Times as long as it takes to pack a walk's orders, or to kick and pack them, it steps before that is done again."""
SLICES, MOVES = 6, 3000
"""Where schedules are counted: times that the orders of a first walk are packed, and moves after each kick."""

Improved = Callable[[Sequence[Schedule], float], None]


@dataclass(frozen=True, eq=False)
class JointFound:
    """``schedules[g]`` of ``graphs[g]``, which run together in ``iteration_time`` seconds; ``slots`` says which
    microbatches meet. ``lower_bound`` holds for every pairing. ``history``: (seconds since the start, iteration time)
    of each improvement."""

    schedules: tuple[Schedule, ...]
    slots: Slots
    iteration_time: float
    lower_bound: float
    evaluations: int
    seconds: float
    history: tuple[tuple[float, float], ...]

    def plan(
        self, graphs: Sequence[OperationGraph], experts: ExpertLayers, *, seed: int = 0, workers: int = 1
    ) -> PlanSet:
        """The plans of all replicas."""
        statistics = SearchStatistics(self.seconds, self.evaluations, workers, seed)
        return make_plan_set(
            graphs, self.schedules, experts, lower_bound=min(self.lower_bound, self.iteration_time), search=statistics
        )


class _Best:
    """The best set of schedules so far."""

    def __init__(self, graphs: Sequence[OperationGraph], experts: ExpertLayers, on_improved: Improved | None) -> None:
        self.graphs, self.experts, self.on_improved = graphs, experts, on_improved
        self.start = time.perf_counter()
        self.time = np.inf
        self.schedules: list[Schedule] = []
        self.together: Together | None = None
        self.history: list[tuple[float, float]] = []
        self.evaluations = 0

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def offer(self, t: Together, schedules: list[Schedule]) -> float:
        """Take a set if it is faster."""
        found = simulate_set_compiled(self.graphs, schedules, self.experts).iteration_time
        if found < self.time:
            self.time, self.schedules, self.together = found, schedules, t
            self.history.append((self.elapsed(), found))
            if self.on_improved is not None:
                self.on_improved(schedules, found)
        return found


def search_joint(
    graphs: Sequence[OperationGraph],
    experts: ExpertLayers,
    *,
    budget_seconds: float,
    seed: int = 0,
    evaluations: int | None = None,
    workers: int = 1,
    slots: Slots | None = None,
    options: SearchOptions | None = None,
    on_improved: Improved | None = None,
) -> JointFound:
    """The best plans of coupled replicas found within ``budget_seconds``, or, if given, ``evaluations`` schedules tried
    in all: the result then depends on ``seed`` and ``evaluations`` alone.

    ``slots``: the pairing to use (None: searched). Every set given meets the conditions of
    :mod:`core.coupled_checks` and each replica's memory limit. Raises DoesNotFitError if nothing fits, CouplingError
    where the replicas can't be coupled.
    """
    options = options or SearchOptions()
    best = _Best(graphs, experts, on_improved)
    counted = evaluations is not None
    candidates = [slots] if slots is not None else pairings(graphs, experts)
    until = np.inf if counted else budget_seconds
    refused: DoesNotFitError | None = None
    ranked: list[tuple[float, Together]] = []
    for i, pairing in enumerate(candidates):
        if i and best.elapsed() > until * PAIRING_SHARE:
            break
        t = together(graphs, experts, pairing)
        try:
            ranked.append((_skeleton(best, t, TRIAL, until, seed, workers, options, counted)[0], t))
        except DoesNotFitError as error:
            refused = refused or error
    if not ranked:
        schedules = one_slot_at_a_time(together(graphs, experts, candidates[0]))
        if not fit_in_memory(graphs, schedules):
            assert refused is not None
            raise refused
        best.offer(together(graphs, experts, candidates[0]), schedules)
    bound = lower_bound(*graphs, experts=experts, split=options.split_backward)
    good_enough = bound * (1.0 + options.gap)
    if best.time > good_enough:
        chosen = [t for _, t in sorted(ranked, key=lambda entry: entry[0])][:PAIRINGS]
        chosen = chosen or [together(graphs, experts, candidates[0])]
        further = _Search(best, chosen, bool(ranked), until, evaluations, seed, workers, options, good_enough)
        starts = further.skeletons()
        if options.sequences and starts and best.elapsed() < until:
            further.walk(starts)
    assert best.together is not None
    return JointFound(
        tuple(best.schedules), best.together.slots, best.time, bound, best.evaluations, best.elapsed(),
        tuple(best.history),
    )  # fmt: skip


def _skeleton(
    best: _Best, t: Together, evaluations: int, seconds: float, seed: int, workers: int, options: SearchOptions,
    counted: bool, fits: bool = True,
) -> tuple[float, list[Schedule]]:  # fmt: skip
    """Search on one graph for all replicas, and offer what that gives them if it ``fits`` their memory; the best joint
    time, and the schedules that have it."""
    found: list[tuple[float, list[Schedule]]] = []

    def improved(schedule: Schedule, _: float) -> None:
        schedules = t.schedules(schedule)
        if fits:
            found.append((best.offer(t, schedules), schedules))
        else:
            time = simulate_set_compiled(best.graphs, schedules, best.experts).iteration_time
            found.append((time, schedules))

    result = search(
        t.graph, budget_seconds=seconds, evaluations=evaluations, seed=seed, workers=1 if counted else workers,
        deterministic=counted, options=options, on_improved=improved,
    )  # fmt: skip
    best.evaluations += result.evaluations
    return min(found, key=lambda entry: entry[0])


@dataclass(frozen=True, eq=False)
class _Search:
    """The search on some pairings: several skeletons, first walks from the best of them, one from the best of these.
    ``fits``: whether the maxima of ``pairs`` do."""

    best: _Best
    pairs: Sequence[Together]
    fits: bool
    until: float
    evaluations: int | None
    seed: int
    workers: int
    options: SearchOptions
    good_enough: float

    def share(self, part: float, over: int) -> int:
        """Schedules to try of each of ``over`` things that have that part of the evaluations."""
        return 10**9 if self.evaluations is None else max(1, int(self.evaluations * part) // over)

    def skeletons(self) -> list[tuple[Together, list[Schedule]]]:
        """Of each pairing in turns, of the maxima and of means, each time with another seed; the fastest first."""
        best, counted = self.best, self.evaluations is not None
        left = max(0.0, self.until - best.elapsed()) * TIMED_SHARE
        tries = self.share(SKELETON_SHARE, 1) if counted else int(left * best.evaluations / best.elapsed())
        graph = self.pairs[0].graph
        starts = max(1, min(STARTS, int(tries / (LEAST_TRIES * graph.virtual_microbatches * graph.ranks))))
        most = max(TRIAL + 1, self.share(SKELETON_SHARE, starts))
        forms = [self._forms(t) for t in self.pairs[:starts]]
        found = []
        for i in range(starts if forms[0] else 0):
            if best.elapsed() >= self.until:
                break
            pair, turn = i % len(forms), i // len(forms)
            t, fits = forms[pair][turn % len(forms[pair])]
            with contextlib.suppress(DoesNotFitError):
                time, schedules = _skeleton(
                    best, t, most, left / starts, self.seed + i, self.workers, self.options, counted, fits=fits
                )
                found.append((time, self.pairs[pair], schedules))
        return [(t, schedules) for _, t, schedules in sorted(found, key=lambda entry: entry[0])]

    def _forms(self, t: Together) -> list[tuple[Together, bool]]:
        """What is searched in place of all replicas, and whether its schedules fit into every one's memory."""
        most = [(t, True)] if self.fits else []
        if not self.options.sequences:  # without walks nothing makes room
            return most
        mean, even = ((t.mean(seconds=seconds, held=True), False) for seconds in (True, False))
        short = [(t.mean(seconds=True, held=False), True)] if self.fits else []
        return [*most, mean, even, *most, mean, *short]

    def walk(self, starts: Sequence[tuple[Together, Sequence[Schedule]]]) -> None:
        """Walks over all replicas' orders, from those of the skeletons that are fastest once packed."""
        best = self.best
        problems: dict[Together, JointProblem] = {}
        chains: list[JointChain] = []
        took = 0.0
        for i, (t, schedules) in enumerate(starts):
            now = best.elapsed()
            if chains and now + took >= self.until:
                break
            if t not in problems:
                problems[t] = make_joint_problem(t)
            with contextlib.suppress(ValueError):  # too much even with the leanest strategies
                chains.append(JointChain(t, problems[t], schedules, self.seed, i, self._late))
            took = best.elapsed() - now
        best.evaluations += sum(chain.made for chain in chains)
        chains = self._unlike(chains)[:WALKS]
        if not chains:
            return
        if chains[0].time < best.time:
            best.offer(chains[0].t, chains[0].schedules())
        at_once = len(chains) if self.evaluations is not None else self.workers
        seconds = (self.until - best.elapsed()) * FIRST_SHARE * at_once / len(chains)
        for i in range(0, len(chains), at_once):
            ends = min(self.until, best.elapsed() + seconds)
            self._run(chains[i : i + at_once], ends, self.share(FIRST_SHARE, len(chains)), 1, kicks=False)
        chains = sorted(chains, key=_time)[: 1 if self.evaluations is not None else self.workers]
        for chain in chains:
            chain.adopt(chain)
        left = 0 if self.evaluations is None else max(0, self.evaluations - best.evaluations)
        self._run(chains, self.until, left, PARTS, kicks=True)

    def _late(self) -> bool:
        return self.best.elapsed() >= self.until

    @staticmethod
    def _unlike(chains: Sequence[JointChain]) -> list[JointChain]:
        """The fastest first; one of those that have the same time, since they have the same orders."""
        first = {chain.time: chain for chain in reversed(chains)}
        return sorted(first.values(), key=_time)

    def _run(
        self, chains: Sequence[JointChain], until: float, evaluations: int, parts: int, kicks: bool
    ) -> None:  # fmt: skip
        """Step walks until then, or so many moves each, in parts, with ``kicks`` or without."""
        best, began = self.best, self.best.elapsed()
        jobs: list[Callable[[], None]]
        for part in range(parts):
            ends = began + (until - began) * (part + 1) / parts
            if self.evaluations is None:
                times = began, ends, until, self.good_enough
                jobs = [partial(_run_timed, best, chain, *times, kicks=kicks) for chain in chains]
            else:
                share = part / parts, 1 / parts, evaluations // parts
                jobs = [partial(_run_counted, chain, *share, kicks=kicks) for chain in chains]
                best.evaluations += evaluations // parts * len(chains)
            in_threads(jobs, self.workers)
            fastest = min(chains, key=_time)
            if fastest.time < best.time:
                best.offer(fastest.t, fastest.schedules())
            if fastest.time <= self.good_enough:
                return
            if part < parts - 1 and not self._late():
                for chain in chains:
                    if chain.time > fastest.time * (1.0 + 1e-4):
                        chain.adopt(fastest)


def _time(chain: JointChain) -> float:
    return chain.time


def _run_counted(chain: JointChain, progress: float, share: float, evaluations: int, kicks: bool) -> None:
    """``evaluations`` schedules: moves, packed now and then, or rounds of a kick and of moves from what comes of it."""
    size, first, moves = MOVES if kicks else max(1, evaluations // SLICES), chain.made, 0
    while (made := moves + chain.made - first) < evaluations:
        now = progress + share * made / evaluations
        if kicks and not chain.kick():
            continue
        tries = min(size, evaluations - made)
        chain.step(now, tries)
        moves += tries
        if kicks:
            chain.settle(now)
        else:
            chain.pack()


def _run_timed(
    best: _Best, chain: JointChain, began: float, ends: float, until: float, good_enough: float, kicks: bool
) -> None:  # fmt: skip
    """The same until the time ``ends``: a walk steps several times as long as its last kick, or packing, took."""
    size, took, now = 16, SLICE_SECONDS, best.elapsed()
    while now < ends and chain.time > good_enough:
        worth = not kicks or chain.kick()
        if kicks:
            took = best.elapsed() - now
        rests = min(ends, best.elapsed() + (KICK_REST if kicks else PACKING_REST) * took)
        while worth and (now := best.elapsed()) < rests and chain.time > good_enough:
            chain.step((now - began) / (until - began), size)
            best.evaluations += size
            spent = best.elapsed() - now
            size = max(1, min(int(size * min(2.0, SLICE_SECONDS / max(spent, 1e-6))), 10_000))
        if kicks and worth:
            chain.settle((now - began) / (until - began))
        elif not kicks and (now := best.elapsed()) < ends:
            chain.pack()
            took = best.elapsed() - now
        now = best.elapsed()


def one_slot_at_a_time(t: Together) -> list[Schedule]:
    """The joint fallback: the forwards of a slot, then its backwards, then the next slot, with the leanest strategies.
    It fits wherever each microbatch fits by itself, can't hang, and needs no search."""
    graph = t.graph
    rows = graph.virtual_microbatches
    slot = np.array([graph.units[int(u)].microbatch for u in graph.unit_of])
    orders: list[list[int]] = [[] for _ in range(graph.ranks)]
    for k in range(t.slots.shape[1]):
        mine = np.flatnonzero(slot == k).tolist()
        for p, order in enumerate(orders):
            trains = graph.has_backward[:, p]
            # Nothing that trains comes before a stage without backward, and it holds nothing once it has run.
            order += [int(Kind.F) * rows + s for s in sorted(mine, key=trains.__getitem__)]
            for s in reversed(mine):
                if graph.has_backward[s, p]:
                    order.append(int(Kind.BW if graph.has_weight[s, p] else Kind.B) * rows + s)
    plain = np.zeros((rows, graph.ranks), dtype=np.int8)
    found = t.schedules(Schedule(tuple(np.array(o, dtype=np.int32) for o in orders), plain))
    return [Schedule(schedule.orders, strategy) for schedule, strategy in zip(found, leanest(t), strict=True)]
