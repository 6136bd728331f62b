"""Static baselines: a partition and an order chosen once, before training, and applied to every batch.

What is chosen once is chosen well: over the number of segments, several balanced partitions and microbatch group
sizes, each simulated with the least uniform recompute that fits, on batches that are known before training; nnScaler*
sees their mean alone, as the paper has it. On every batch each still recomputes just as much as that one needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..core.graph import Floats, OperationGraph
from ..core.simulate import simulate_compiled
from ..describe.cost import CostModel, priced_graph
from ..describe.model import LayerRun, ModelError, ModulePartition, MultimodalModel, Partition
from ..describe.workload import Microbatch
from .common import BaselineError
from .entry import Found, MixedChunks, Problem
from .fit import Fitted
from .mean import mean_graph
from .megatron import legal_group
from .registry import find_schedule
from .static_partition import (
    Stages,
    encoders_apart,
    encoders_whole,
    item_seconds,
    latency_balanced,
    parameter_balanced,
)

MEMORY_WEIGHTS = (0.0, 0.3, 1.0, 3.0)


def static_choice(
    name: str, stages: Stages, ranks: int, *, turned: bool = False, group: int | None = None
) -> Partition:
    """The chunks that a static schedule (``name``) fixes: its virtual stages, whether they are placed in a V, and
    Megatron's microbatch group size (None: :func:`legal_group`)."""
    return Partition((ModulePartition.of_stages(stages, ranks, turned=turned),), schedule=name, group=group)


def static_plan(
    pricer: CostModel, choice: Partition, microbatches: Sequence[Microbatch], memory_limit: float | None = None
) -> tuple[OperationGraph, Fitted]:
    """The choice applied to one batch, with the least uniform recompute that fits it (kind to the baseline: a static
    run must fix that too). Raises BaselineError where the schedule can't run the batch."""
    graph = priced_graph(pricer, choice, microbatches, memory_limit)
    found = find_schedule(choice.schedule).find(Problem(graph, group=choice.group))
    return graph, _fitted(graph, found)


def tune_static(
    name: str,
    pricer: CostModel,
    batches: Sequence[Sequence[Microbatch]],
    memory_limit: float | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Partition:
    """The best choice of a schedule over mixed chunks (an entry's name) for these batches: the least mean iteration
    time of those that fit all of them.

    ``progress`` is called after each candidate. Raises BaselineError if no candidate can run the batches at all, or
    if the schedule runs over segments.
    """
    rules = find_schedule(name).mixed
    if rules is None:
        raise BaselineError(f"{name} runs over chunks of one modality each: a partition says which")
    seconds = item_seconds(pricer, [m for batch in batches for m in batch])
    best: tuple[tuple[bool, float], Partition] | None = None
    reason: BaselineError | None = None
    for family in _families(name, rules, pricer, seconds, min(len(batch) for batch in batches)):
        for memory_weight in MEMORY_WEIGHTS:
            tried = []
            for choice in family(memory_weight):
                try:
                    tried.append((_worth(pricer, choice, rules, batches, memory_limit), choice))
                except BaselineError as error:
                    reason = error
                progress()
            for worth, choice in tried:
                if best is None or worth[:2] < best[0]:
                    best = worth[:2], choice
            # Counting parameters only pays where memory forced recompute, or nothing fitted at all.
            if not tried or min(worth[2] for worth, _ in tried) == 0 or rules.by_parameters:
                break
    if best is None:
        raise reason or BaselineError(f"{name}: no partition to try")
    return best[1]


def given_choice(name: str, model: MultimodalModel, layers: dict[str, tuple[tuple[int, ...], ...]]) -> Partition:
    """The choice of a schedule over mixed chunks whose layers are given, ``[segment][rank]`` of each module.

    A module's stem stands with its first layers, its head with its last ones. Raises ModelError for layers that are
    not the model's, or chunks without any.
    """
    rules = find_schedule(name).mixed
    segments, ranks = len(next(iter(layers.values()))), model.parallel.pp
    # Those that interleave take any number; what is tried when nothing is given is another matter.
    interleaves = rules is not None and len(rules.segments) > 1
    if rules is None or not (segments in rules.segments or (interleaves and segments >= 1)):
        allowed = ", ".join(map(str, rules.segments if rules else ()))
        raise ModelError(f"{name} takes {allowed} chunks a rank, the layers given have {segments}")
    runs: list[tuple[LayerRun, ...]] = [()] * (segments * ranks)
    for shape in model.modules:
        if len(layers[shape.name]) != segments or any(len(row) != ranks for row in layers[shape.name]):
            raise ModelError(f"{name}: {shape.name} needs layers for {segments} segments of {ranks} ranks, as all have")
        rows = [row[::-1] if rules.turned and k == 1 else row for k, row in enumerate(layers[shape.name])]
        counts = [n for row in rows for n in row]
        held = [v for v, n in enumerate(counts) if n]
        if sum(counts) != shape.layers:
            raise ModelError(f"{name}: {shape.name} gets {sum(counts)} layers, the model has {shape.layers}")
        for v in held:
            runs[v] += (LayerRun(shape.name, counts[v], stem=v == held[0], head=v == held[-1]),)
    _check_chain(name, model, runs)
    return static_choice(name, tuple(runs), ranks, turned=rules.turned)


def _check_chain(name: str, model: MultimodalModel, runs: Sequence[tuple[LayerRun, ...]]) -> None:
    """Raises ModelError unless every stage has layers and each module ends before the next one begins."""
    order = [m.name for m in model.modules]
    flat = [order.index(run.module) for stage in runs for run in stage]
    empty = next((v for v, stage in enumerate(runs) if not stage), None)
    if empty is not None:
        raise ModelError(f"{name}: stage {empty} has no layers; every chunk of a schedule over mixed chunks needs some")
    if flat != sorted(flat):
        raise ModelError(f"{name}: {order[flat[0]]} must end before the next module begins")


def _fitted(graph: OperationGraph, found: Found) -> Fitted:
    timeline = simulate_compiled(graph, found.schedule)
    fits = bool(np.all(timeline.peak_bytes <= graph.memory_limit))
    return Fitted(found.schedule, timeline, int(found.schedule.strategy.max(initial=0)), fits)


def _worth(
    pricer: CostModel,
    choice: Partition,
    rules: MixedChunks,
    batches: Sequence[Sequence[Microbatch]],
    memory_limit: float | None,
) -> tuple[bool, float, int]:
    """(does not fit, mean seconds or greatest excess bytes, most recompute) over the batches."""
    times, excess, level = [], 0.0, 0
    entry = find_schedule(choice.schedule)
    for microbatches in batches:
        graph = priced_graph(pricer, choice, microbatches, memory_limit)
        graph = mean_graph(graph) if rules.on_mean else graph
        fitted = _fitted(graph, entry.find(Problem(graph, group=choice.group)))
        times.append(fitted.timeline.iteration_time)
        level = max(level, fitted.strategy)
        if not fitted.fits:
            excess = max(excess, float(np.max(fitted.timeline.peak_bytes - graph.memory_limit)))
    return excess > 0, excess or float(np.mean(times)), level


def _families(
    name: str, rules: MixedChunks, pricer: CostModel, seconds: Floats, microbatches: int
) -> Iterator[Callable[[float], Iterator[Partition]]]:
    """Per number of segments, the choices to try at a given weight of memory."""
    model = pricer.model
    ranks, turned = model.parallel.pp, rules.turned
    for segments in rules.segments:
        if segments * ranks > len(seconds) or (segments > 1 and not turned and (ranks < 2 or microbatches < ranks)):
            continue

        def family(memory_weight: float, segments: int = segments) -> Iterator[Partition]:
            if rules.encoders == "whole":
                partitions: tuple[Stages, ...] = encoders_whole(seconds, model, segments, memory_weight)
            elif rules.encoders == "apart":
                partitions = encoders_apart(seconds, model, memory_weight)
            elif rules.by_parameters:
                partitions = (parameter_balanced(model, segments),)
            else:
                partitions = latency_balanced(seconds, model, segments, turned=turned, memory_weight=memory_weight)
            for stages in partitions:
                for group in _groups(rules, segments, microbatches, ranks):
                    yield static_choice(name, stages, ranks, turned=turned, group=group)

        yield family


def _groups(rules: MixedChunks, segments: int, microbatches: int, ranks: int) -> list[int | None]:
    if segments == 1 or rules.turned:
        return [None]
    first = legal_group(microbatches, ranks)
    groups: list[int | None] = [None]
    if rules.groups:
        groups += [g for g in (2 * ranks,) if g > first and g <= microbatches and not 0 < microbatches % g < ranks]
    return groups
