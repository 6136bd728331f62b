"""Static baselines: a partition and an order chosen once, before training, and applied to every batch.

What is chosen once is chosen well: over the number of segments, several balanced partitions and microbatch group
sizes, each simulated with the least uniform recompute that fits, on batches that are known before training; nnScaler*
sees their mean alone, as the paper has it. On every batch each still recomputes just as much as that one needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..core.graph import Floats, StageGraph
from ..core.order import Schedule
from ..describe.cost import CostModel, mixed_graph
from ..describe.workload import Microbatch
from .common import BaselineError
from .fit import Fitted, least_recompute
from .mean import mean_graph
from .megatron import check_group, interleaved, legal_group, one_forward_one_backward
from .static_partition import Stages, item_seconds, latency_balanced, parameter_balanced
from .zero_bubble import zb_h1_options, zb_v_options

StaticName = Literal[
    "megatron-1f1b", "megatron-interleaved", "megatron-parameter-balanced", "zb-h1", "zb-v", "nnscaler"
]
STATIC_BASELINES: tuple[StaticName, ...] = (
    "megatron-1f1b", "megatron-interleaved", "megatron-parameter-balanced", "zb-h1", "zb-v", "nnscaler",
)  # fmt: skip

SEGMENTS = (1, 2, 3, 4, 6, 8)
MEMORY_WEIGHTS = (0.0, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class StaticChoice:
    """What a static baseline fixed: its virtual stages, how many of them a rank has, whether they are placed in a V,
    and Megatron's microbatch group size (None: :func:`legal_group`)."""

    name: StaticName
    stages: Stages
    segments: int
    turned: bool = False
    group: int | None = None


def static_graph(
    pricer: CostModel, choice: StaticChoice, microbatches: Sequence[Microbatch], memory_limit: float | None = None
) -> StageGraph:
    """The mixed graph of a batch on the choice's virtual stages, one unit per microbatch; ``memory_limit`` in bytes."""
    back = (False, True) if choice.turned else ()
    return mixed_graph(pricer, choice.stages, microbatches, memory_limit, reversed=back)


def static_plan(
    pricer: CostModel, choice: StaticChoice, microbatches: Sequence[Microbatch], memory_limit: float | None = None
) -> tuple[StageGraph, Fitted]:
    """The choice applied to one batch, with the least uniform recompute that fits it (kind to the baseline: a static
    run must fix that too). Raises BaselineError where the schedule can't run the batch."""
    graph = static_graph(pricer, choice, microbatches, memory_limit)
    return graph, least_recompute(graph, _builder(choice))


def tune_static(
    name: StaticName,
    pricer: CostModel,
    batches: Sequence[Sequence[Microbatch]],
    memory_limit: float | None = None,
    progress: Callable[[], None] = lambda: None,
) -> StaticChoice:
    """The best choice of a baseline for these batches: the least mean iteration time of those that fit all of them.

    ``progress`` is called after each candidate. Raises BaselineError if no candidate can run the batches at all.
    """
    seconds = item_seconds(pricer, [m for batch in batches for m in batch])
    best: tuple[tuple[bool, float], StaticChoice] | None = None
    reason: BaselineError | None = None
    for family in _families(name, pricer, seconds, min(len(batch) for batch in batches)):
        for memory_weight in MEMORY_WEIGHTS:
            tried = []
            for choice in family(memory_weight):
                try:
                    tried.append((_worth(pricer, choice, batches, memory_limit), choice))
                except BaselineError as error:
                    reason = error
                progress()
            for worth, choice in tried:
                if best is None or worth[:2] < best[0]:
                    best = worth[:2], choice
            # Counting parameters only pays where memory forced recompute, or nothing fitted at all.
            if not tried or min(worth[2] for worth, _ in tried) == 0 or name == "megatron-parameter-balanced":
                break
    if best is None:
        raise reason or BaselineError(f"{name}: no partition to try")
    return best[1]


def _worth(
    pricer: CostModel, choice: StaticChoice, batches: Sequence[Sequence[Microbatch]], memory_limit: float | None
) -> tuple[bool, float, int]:
    """(does not fit, mean seconds or greatest excess bytes, most recompute) over the batches."""
    times, excess, level = [], 0.0, 0
    for microbatches in batches:
        graph = static_graph(pricer, choice, microbatches, memory_limit)
        graph = mean_graph(graph) if choice.name == "nnscaler" else graph
        fitted = least_recompute(graph, _builder(choice))
        times.append(fitted.timeline.iteration_time)
        level = max(level, fitted.strategy)
        if not fitted.fits:
            excess = max(excess, float(np.max(fitted.timeline.peak_bytes - graph.memory_limit)))
    return excess > 0, excess or float(np.mean(times)), level


def _families(
    name: StaticName, pricer: CostModel, seconds: Floats, microbatches: int
) -> Iterator[Callable[[float], Iterator[StaticChoice]]]:
    """Per number of segments, the choices to try at a given weight of memory."""
    model = pricer.model
    ranks = model.parallel.pp
    turned = name == "zb-v"
    fixed = {"megatron-1f1b": (1,), "zb-h1": (1,), "zb-v": (2,)}.get(name, SEGMENTS)
    for segments in fixed:
        if segments * ranks > len(seconds) or (segments > 1 and not turned and (ranks < 2 or microbatches < ranks)):
            continue

        def family(memory_weight: float, segments: int = segments) -> Iterator[StaticChoice]:
            if name == "megatron-parameter-balanced":
                partitions: tuple[Stages, ...] = (parameter_balanced(model, segments),)
            else:
                partitions = latency_balanced(seconds, model, segments, turned=turned, memory_weight=memory_weight)
            for stages in partitions:
                for group in _groups(name, segments, microbatches, ranks):
                    yield StaticChoice(name, stages, segments, turned, group)

        yield family


def _groups(name: StaticName, segments: int, microbatches: int, ranks: int) -> list[int | None]:
    if segments == 1 or name == "zb-v":
        return [None]
    first = legal_group(microbatches, ranks)
    groups: list[int | None] = [None]
    if name != "megatron-parameter-balanced":
        groups += [g for g in (2 * ranks,) if g > first and g <= microbatches and not 0 < microbatches % g < ranks]
    return groups


def _builder(choice: StaticChoice) -> Callable[[StageGraph], Sequence[Schedule]]:
    def build(graph: StageGraph) -> Sequence[Schedule]:
        if choice.name == "zb-h1":
            return zb_h1_options(graph)
        if choice.name == "zb-v":
            return zb_v_options(graph)
        if choice.segments == 1:
            return [one_forward_one_backward(graph)]
        group = choice.group
        if group is not None:
            try:
                check_group(len(graph.units), graph.ranks, group)
            except BaselineError:
                group = None
        return [interleaved(graph, group)]

    return build
