"""The choice of a partition: by the paper's rules, or searched and judged by simulated iterations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import inf
from typing import Literal, TypeVar

import numpy as np

from ..core import OperationGraph
from ..describe.cost import Cluster, CostModel, Costs, priced_graph, unit_sizes
from ..describe.cost.static import run_bytes
from ..describe.model import ModulePartition, ModuleShape, MultimodalModel, Parallel, Partition, spread
from ..describe.partition.layers import ModuleLoad, balance_layers, rank_loads
from ..describe.partition.unit_size import UnitSize, efficient_unit_size, mean_instance, module_seconds, times
from ..describe.workload import GlobalBatch, Microbatch, make_units
from ..schedulers.dip.engine import search
from ..schedulers.dip.feasibility import DoesNotFitError

Judge = Callable[[OperationGraph], float]
"""Predicted iteration time (seconds) of a stage graph; inf if it doesn't fit in memory."""

Item = TypeVar("Item")

Placement = Literal["segmented", "replicated", "either"]
Placements = Mapping[str, Placement]


class NoPartitionError(ValueError):
    """No partition fits the memory; the message says what would help."""


@dataclass(frozen=True)
class Given:
    """What of a module is settled before a partition is searched: its ``layers`` by segment and rank (None: nothing of
    them), and its ``unit_size`` (None: whole microbatches) where it is ``sized``."""

    layers: tuple[tuple[int, ...], ...] | None = None
    unit_size: int | None = None
    sized: bool = False

    def within(self, part: ModulePartition) -> ModulePartition:
        """``part`` with what is settled."""
        if self.layers is not None:
            part = ModulePartition(part.module, self.layers, part.unit_size)
        return replace(part, unit_size=self.unit_size) if self.sized else part


STAGE_WEIGHTS = (0.1, 1.0)
MAX_SEGMENTS = 6
FINALISTS = 3
PATIENCE = 4.0  # times the budget by the clock, where others need the cores


def greedy_judge(evaluations: int = 32, seed: int = 0) -> Judge:
    """Judge by a search of so many schedules; the answer depends on nothing else."""

    def judge(graph: OperationGraph) -> float:
        try:
            result = search(graph, budget_seconds=60, evaluations=evaluations, seed=seed, deterministic=True)
        except DoesNotFitError:
            return inf
        return result.iteration_time

    return judge


@dataclass(frozen=True)
class _Setting:
    """What the search varies: per module segments (0: it stands whole on every rank) and unit size; how much an even
    pace of stages counts."""

    segments: tuple[int, ...]
    sizes: tuple[int | None, ...]
    stage_weight: float


def paper_partition(
    model: MultimodalModel, cluster: Cluster, batches: Sequence[GlobalBatch], *, costs: Costs | None = None
) -> Partition:
    """The paper's rules (section 1): B_i by the 95% rule, K_i = floor(T_i / T_1), layers spread evenly.

    K_i is limited so that every chunk has a layer; where P * K_i doesn't divide the layers, chunks differ by one.
    """
    return _paper(CostModel(model, cluster, costs), _microbatches(batches))


def choose_partition(
    model: MultimodalModel,
    cluster: Cluster,
    batches: Sequence[GlobalBatch],
    *,
    costs: Costs | None = None,
    memory_limit: float | None = None,
    budget_seconds: float = 60.0,
    max_trials: int | None = None,
    judge: Judge | None = None,
    on_trial: Callable[[str, float], None] | None = None,
    placements: Placements | None = None,
    given: Mapping[str, Given] | None = None,
) -> Partition:
    """The partition with the least predicted iteration time on ``batches`` that a local search finds.

    Starts from the paper's rules and from one segment each; steps change one module's segments or sub-microbatch size,
    or how layers are balanced (uneven, with stem, head and loss counted). Each trial simulates every batch; the best
    few are judged again more closely. Ends after ``budget_seconds``, or ``max_trials`` partitions (with these and an
    endless budget the result is reproducible), or when no step or pair of steps helps. The seconds are this process's
    on a core, after a first trial for which kernels may have to be compiled, so that a first run or a busy machine
    doesn't choose worse; by the clock at most four times as many. ``on_trial`` hears of every trial (description,
    seconds). ``placements`` by module name: whether it is cut over all ranks or stands whole on each, which then pays
    for the sum of its gradients; without one it is cut. ``given`` by module name: what is settled of it; a module with
    layers must not be placed otherwise. Raises NoPartitionError if nothing fits the memory.
    """
    if not batches:
        raise ValueError("choosing a partition needs at least one batch to judge by")
    pricer = CostModel(model, cluster, costs)
    return _Search(pricer, batches, memory_limit, judge, on_trial, placements or {}, given or {}).run(
        budget_seconds, max_trials
    )


def _microbatches(batches: Sequence[GlobalBatch]) -> list[Microbatch]:
    return [m for b in batches for m in b.microbatches]


def _paper(pricer: CostModel, microbatches: Sequence[Microbatch]) -> Partition:
    model, ranks = pricer.model, pricer.model.parallel.pp
    sizes = {m.name: efficient_unit_size(pricer, m.name, microbatches) for m in model.modules}
    latency = {m.name: _latency(pricer, m.name, sizes[m.name], microbatches) for m in model.modules}
    fastest = min((t for t in latency.values() if t > 0), default=1.0)
    parts, reasons = [], []
    for shape in model.modules:
        wanted = max(1, int(latency[shape.name] / fastest))
        segments = max(1, min(wanted, shape.layers // ranks))
        chosen = sizes[shape.name]
        parts.append(ModulePartition(shape.name, spread(shape.layers, segments, ranks), chosen.size))
        size = "in whole microbatches" if chosen.size is None else f"with {chosen.size} at a time"
        limited = f", limited to {segments} by its {shape.layers} layers" if segments < wanted else ""
        reasons.append(
            f"{shape.name}: {size} it keeps {chosen.share:.1%} of its best efficiency and takes "
            f"{1e3 * latency[shape.name]:.1f} ms, {latency[shape.name] / fastest:.1f} times the fastest module, "
            f"so {wanted} segment{'s' * (wanted > 1)}{limited}."
        )
    return Partition(tuple(parts), tuple(reasons))


def _latency(pricer: CostModel, module: str, size: UnitSize, microbatches: Sequence[Microbatch]) -> float:
    """T_i: seconds of the whole module on one unit of B_i mean instances."""
    instance, most = mean_instance(pricer.model.module(module), microbatches)
    if instance is None:
        return 0.0
    return float(module_seconds(pricer, module, times(instance, [size.size or most]))[0])


class _Search:
    """Local search over settings; every partition is judged once."""

    def __init__(
        self,
        pricer: CostModel,
        batches: Sequence[GlobalBatch],
        memory_limit: float | None,
        judge: Judge | None,
        on_trial: Callable[[str, float], None] | None,
        placements: Placements,
        given: Mapping[str, Given],
    ) -> None:
        self.given = [given.get(m.name, Given()) for m in pricer.model.modules]
        self.placements = [placements.get(m.name, "segmented") for m in pricer.model.modules]
        self.pricer, self.batches, self.memory_limit, self.on_trial = pricer, batches, memory_limit, on_trial
        self.microbatches = _microbatches(batches)
        self.quick = judge or greedy_judge(32)
        self.closer = judge or greedy_judge(400)
        self.judged: dict[tuple[ModulePartition, ...], float] = {}
        self.ladders = [_ladder(max(m.instances(s) for m in self.microbatches)) for s in pricer.model.modules]

    def run(self, budget_seconds: float, max_trials: int | None) -> Partition:
        paper = _paper(self.pricer, self.microbatches)
        settled = tuple(g.within(part) for g, part in zip(self.given, paper.modules, strict=True))
        paper = replace(paper, modules=settled)
        if self._allowed(paper.modules) or max_trials != 1:  # one trial is of what can be chosen
            self._judge(paper)
        sizes = tuple(m.unit_size for m in paper.modules)
        starts = [
            _Setting(tuple(m.segments for m in paper.modules), sizes, STAGE_WEIGHTS[0]),
            _Setting((1,) * len(paper.modules), sizes, STAGE_WEIGHTS[0]),
            _Setting((1,) * len(paper.modules), (None,) * len(paper.modules), STAGE_WEIGHTS[0]),
        ]
        # Modules whose placement is open: from each side, as a climb seldom crosses over.
        sides = [("replicated",), ("replicated", "either")] if "either" in self.placements else [("replicated",)]
        for i, side in enumerate(sides):
            end = None if max_trials is None else len(self.judged) + (max_trials - len(self.judged)) // (len(sides) - i)
            self._climb([self._whole(s, side) for s in starts], budget_seconds / len(sides), end)
        return self._decide(paper)

    def _climb(self, starts: Sequence[_Setting], budget_seconds: float, max_trials: int | None) -> None:
        """From the best of some settings, until no step or pair of steps makes it better."""
        began, cores = time.monotonic(), time.process_time()
        most = inf if max_trials is None else max_trials
        values: dict[_Setting, float] = {}
        for start in starts:
            if len(self.judged) < most or not any(map(self._allowed, self.judged)):
                values[start] = self._judge(self.partition(start))
        improved, best = bool(values), min(values, key=values.__getitem__, default=starts[0])
        value = values.get(best, inf)
        while improved:
            improved = False
            pairs = (second for first in self._steps(best) for second in self._steps(first))
            for step in chain(self._steps(best), pairs):
                late = time.process_time() - cores > budget_seconds
                late = late or time.monotonic() - began > PATIENCE * budget_seconds
                if late or len(self.judged) >= most:
                    break
                found = self._judge(self.partition(step))
                if found < value * (1 - 1e-4):
                    best, value, improved = step, found, True
                    break

    def _decide(self, paper: Partition) -> Partition:
        finalists = sorted(self.judged, key=lambda p: self.judged[p])[:FINALISTS]
        closely = {p: self._seconds(Partition(p), self.closer) for p in dict.fromkeys((*finalists, paper.modules))}
        chosen = min(closely, key=lambda p: (not self._allowed(p), closely[p]))
        if closely[chosen] == inf or not self._allowed(chosen):
            raise NoPartitionError(
                "no partition fits the memory: every one tried needs more than a rank has, even with full recompute; "
                "raise pp or tp, shard the optimizer over more replicas (dp), or shorten the microbatches"
            )
        return Partition(chosen, self._reasons(chosen, closely, paper))

    # -- trials --------------------------------------------------------------------------------------------------
    def partition(self, setting: _Setting) -> Partition:
        model, ranks = self.pricer.model, self.pricer.model.parallel.pp
        sizes = (g.unit_size if g.sized else s for g, s in zip(self.given, setting.sizes, strict=True))
        setting = replace(setting, sizes=tuple(sizes))
        # Units of modules that stand on every rank even out what the others leave.
        cut = [load for load in self._loads(setting) if load.segments]
        rows = {load.name: row for load, row in zip(cut, balance_layers(cut, ranks, setting.stage_weight), strict=True)}
        return Partition(
            tuple(
                ModulePartition(m.name, rows[m.name], size)
                if m.name in rows
                else ModulePartition.whole(m.name, m.layers, ranks, size)
                for m, size in zip(model.modules, setting.sizes, strict=True)
            )
        )

    def _whole(self, setting: _Setting, placements: tuple[str, ...]) -> _Setting:
        """``setting`` with the modules of these placements on every rank."""
        segments = zip(setting.segments, self.placements, strict=True)
        return replace(setting, segments=tuple(0 if placed in placements else k for k, placed in segments))

    def _allowed(self, parts: tuple[ModulePartition, ...]) -> bool:
        return all(
            placed == "either" or p.replicated == (placed == "replicated")
            for p, placed in zip(parts, self.placements, strict=True)
        )

    def _loads(self, setting: _Setting) -> list[ModuleLoad]:
        """Seconds of each module's parts over all batches, cut into units as the setting says."""
        sizes = {m.name: s for m, s in zip(self.pricer.model.modules, setting.sizes, strict=True)}
        units = make_units(self.pricer.model, self.microbatches, sizes)
        loads = []
        for shape, segments, given in zip(self.pricer.model.modules, setting.segments, self.given, strict=True):
            mine = [(u.microbatch, u.first, u.count) for u in units if u.module == shape.name]
            here = unit_sizes(shape, self.microbatches, mine, shape.sharing(self.pricer.model.parallel))
            whole = float(module_seconds(self.pricer, shape.name, here).sum())
            ends = [
                float((part.forward + part.backward + part.weight).sum())
                for part in (self.pricer.stem(shape.name, here), self.pricer.head(shape.name, here))
            ]
            layer = (whole - sum(ends)) / shape.layers
            last = int(_meets_behind(shape, self.pricer.model.parallel) or shape.carried > 1)
            loads.append(ModuleLoad(shape.name, shape.layers, segments, layer, ends[0], ends[1], last, given.layers))
        return loads

    def _judge(self, partition: Partition) -> float:
        if partition.modules not in self.judged:
            self.judged[partition.modules] = seconds = self._seconds(partition, self.quick)
            if self.on_trial is not None:
                self.on_trial(_describe(partition.modules), seconds)
        return self.judged[partition.modules]

    def _seconds(self, partition: Partition, judge: Judge) -> float:
        total = 0.0
        for batch in self.batches:
            graph = priced_graph(self.pricer, partition, batch.microbatches, self.memory_limit)
            total += judge(graph) + copies_seconds(self.pricer, partition)
            if total == inf:
                break
        return total / len(self.batches)

    def _steps(self, setting: _Setting) -> Iterator[_Setting]:
        ranks = self.pricer.model.parallel.pp
        for i, shape in enumerate(self.pricer.model.modules):
            ladder = self.ladders[i]
            # The step of the ladder nearest to the present size; None, whole microbatches, is its top.
            at = sum(1 for size in ladder if (size or inf) > (setting.sizes[i] or inf))
            at = min(at, len(ladder) - 1)
            for j in (at - 1, at + 1, at - 2, at + 2):
                if 0 <= j < len(ladder) and ladder[j] != setting.sizes[i]:
                    yield replace(setting, sizes=_with(setting.sizes, i, ladder[j]))
            if self.placements[i] == "either":
                yield replace(setting, segments=_with(setting.segments, i, 0 if setting.segments[i] else 1))
            for k in (setting.segments[i] + 1, setting.segments[i] - 1) if setting.segments[i] else ():
                if 1 <= k <= min(MAX_SEGMENTS, -(-shape.layers // ranks)):
                    yield replace(setting, segments=_with(setting.segments, i, k))
        for weight in STAGE_WEIGHTS:
            if weight != setting.stage_weight:
                yield replace(setting, stage_weight=weight)

    # -- words ---------------------------------------------------------------------------------------------------
    def _reasons(
        self, chosen: tuple[ModulePartition, ...], closely: dict[tuple[ModulePartition, ...], float], paper: Partition
    ) -> tuple[str, ...]:
        tried = len(self.judged)
        out = [
            f"Simulated on {len(self.batches)} batch{'es' * (len(self.batches) > 1)}: {closely[chosen]:.3f} s an "
            f"iteration, the best of {tried} partition{'s' * (tried > 1)} tried."
        ]
        other = closely[paper.modules]
        if chosen == paper.modules:
            out.append("That is the partition of the paper's rules.")
        elif other == inf:
            out.append(f"The paper's rules give {_describe(paper.modules)}, which does not fit the memory.")
        else:
            out.append(f"The paper's rules give {_describe(paper.modules)}: {other:.3f} s.")
        out += [f"Paper's rules, {reason}" for reason in paper.reasons]
        setting = _Setting(
            tuple(0 if p.replicated else p.segments for p in chosen), tuple(p.unit_size for p in chosen), 0.0
        )
        totals = [[sum(column) for column in zip(*p.layers, strict=True)] for p in chosen if not p.replicated]
        loads = rank_loads([load for load in self._loads(setting) if load.segments], totals)
        mean = sum(loads) / len(loads)
        out.append(
            f"With stems, heads and loss counted, the most-loaded rank has {max(loads) / mean:.3f} times the mean work."
        )
        return tuple(out)


def _meets_behind(shape: ModuleShape, parallel: Parallel) -> bool:
    """Whether the module has experts behind its last layer (multi-token prediction's) that replicas share. Where they
    run, all must know that they meet there: by a layer with experts on the same chunk. (To such a head embeddings may
    have travelled, too: then it is mcore-bridge's, which wants a layer there to load its norm.)"""
    return bool(shape.mtp) and parallel.coupled > 1 and shape.kind(shape.layers - 1).experts


def _segments(count: int) -> str:
    return f"{count} segment{'s' * (count > 1)}"


def copies_seconds(pricer: CostModel, partition: Partition) -> float:
    """Seconds at the end of an iteration in which the gradients of modules that stand on every rank are summed over
    them: an all-reduce around the ring sends each gradient, of four bytes, almost twice."""
    ranks, total = pricer.model.parallel.pp, 0.0
    for shape in (pricer.model.module(p.module) for p in partition.modules if p.replicated):
        gradients = run_bytes(
            pricer.model, pricer.cluster, shape, range(shape.layers), True, 1 + len(shape.taps)
        ).gradients
        total += float(pricer.transfer_seconds(np.array([2.0 * gradients * (ranks - 1) / ranks]))[0])
    return total


def _ladder(most: int) -> list[int | None]:
    """Sub-microbatch sizes worth trying: those that cut the fullest microbatch into one more slice each, about."""
    sizes: list[int | None] = [None]
    for slices in (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 48):
        size = -(-most // slices)
        if size < most and size not in sizes:
            sizes.append(size)
    return sizes


def _with(values: tuple[Item, ...], i: int, value: Item) -> tuple[Item, ...]:
    return (*values[:i], value, *values[i + 1 :])


def _describe(parts: Sequence[ModulePartition]) -> str:
    return ", ".join(
        f"{p.module} {'on every rank, units' if p.replicated else _segments(p.segments)} of "
        f"{'whole microbatches' if p.unit_size is None else p.unit_size}"
        for p in parts
    )
