"""The schedules that come with the package, as entries of the registry.

An entry imports its algorithm when it is first used, so that names and refusals load no numba and no scipy.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.order import Schedule
from ..core.plan import SearchStatistics
from .common import BaselineError
from .entry import Found, FoundSet, LeastRecompute, MixedChunks, Problem, ScheduleEntry, SetProblem
from .megatron import check_group, interleaved, legal_group, one_forward_one_backward

if TYPE_CHECKING:
    from ..describe.model import MultimodalModel


@dataclass(frozen=True)
class _Search:
    """The anytime search, ``dip`` or the paper's ``dip-paper``."""

    name: str

    def __call__(self, problem: Problem) -> Found:
        from .dip.engine import search

        effort, given = problem.effort, False

        def improved(schedule: Schedule, *_: object) -> None:
            nonlocal given
            if not given:
                given = True
                problem.on_first(schedule)

        found = search(
            problem.graph, schedule=self.name, budget_seconds=effort.budget_seconds, seed=effort.seed,
            workers=effort.workers, evaluations=effort.evaluations, deterministic=effort.deterministic,
            options=effort.options, on_improved=improved,
        )  # fmt: skip
        statistics = SearchStatistics(found.seconds, found.evaluations, found.workers, found.seed)
        return Found(found.schedule, statistics, found.lower_bound)


def _dip_set(problem: SetProblem) -> FoundSet:
    """Pairing and orders of coupled replicas, searched together; never slower than the greedy's, which a search that
    has hardly begun can be."""
    from ..core.simulate import simulate_set_compiled
    from .greedy import greedy_set
    from .joint import search_joint

    effort = problem.effort
    simple = greedy_set(problem.graphs, problem.experts)
    simple_seconds = simulate_set_compiled(problem.graphs, simple, problem.experts).iteration_time
    given = False

    def improved(schedules: Sequence[Schedule], seconds: float) -> None:
        nonlocal given
        if not given:
            given = True
            problem.on_first(schedules if seconds <= simple_seconds else simple)

    found = search_joint(
        problem.graphs, problem.experts, budget_seconds=effort.budget_seconds, seed=effort.seed,
        evaluations=effort.evaluations, workers=effort.workers, options=effort.options, on_improved=improved,
    )  # fmt: skip
    return FoundSet(
        found.schedules if found.iteration_time <= simple_seconds else tuple(simple),
        SearchStatistics(found.seconds, found.evaluations, effort.workers, effort.seed),
        min(found.lower_bound, found.iteration_time, simple_seconds),
    )


def _megatron(problem: Problem) -> Sequence[Schedule]:
    """1F1B for one virtual stage a rank, else the interleaved order."""
    graph, group = problem.graph, problem.group
    if graph.modules[0].segments == 1:
        return [one_forward_one_backward(graph)]
    if group is not None:
        try:
            check_group(len(graph.units), graph.ranks, group)
        except BaselineError:
            group = None  # chosen for other batches
    return [interleaved(graph, group)]


def _zb_h1(problem: Problem) -> Sequence[Schedule]:
    from .zero_bubble import zb_h1_options

    return zb_h1_options(problem.graph)


def _zb_v(problem: Problem) -> Sequence[Schedule]:
    from .zero_bubble import zb_v_options

    return zb_v_options(problem.graph)


def _optimus(problem: Problem) -> Sequence[Schedule]:
    from .optimus import optimus_leads

    return optimus_leads(problem.graph)


def _segmented_static(problem: Problem) -> Found:
    from .fit import least_recompute_by_module
    from .segmented import segmented_static

    start = time.perf_counter()
    fitted = least_recompute_by_module(problem.graph, segmented_static)
    return Found(fitted.schedule, SearchStatistics(time.perf_counter() - start, 1, 1, 0))


def _encoders_first(problem: Problem) -> Found:
    from .encoders import encoders_first
    from .fit import least_recompute_by_module

    start = time.perf_counter()
    fitted = least_recompute_by_module(problem.graph, encoders_first)
    return Found(fitted.schedule, SearchStatistics(time.perf_counter() - start, 1, 1, 0))


def _nested_encoders(problem: Problem) -> Found:
    from .encoders import nested_encoders

    start = time.perf_counter()
    fitted = nested_encoders(problem.graph)
    return Found(fitted.schedule, SearchStatistics(time.perf_counter() - start, 1, 1, 0))


def _too_few_pieces(model: MultimodalModel, segments: int) -> str | None:
    """Stages are made of stems, layers and heads; each needs one."""
    pieces, stages = sum(m.layers + 2 for m in model.modules), segments * model.parallel.pp
    if pieces >= stages:
        return None
    return f"{model.name} has {pieces} layers, stems and heads for {stages} virtual stages; lower the pipeline size"


def _one_each(model: MultimodalModel, microbatches: int) -> str | None:
    return _too_few_pieces(model, 1)


def _two_each(model: MultimodalModel, microbatches: int) -> str | None:
    return _too_few_pieces(model, 2)


def _encoder_on_first(model: MultimodalModel, microbatches: int) -> str | None:
    last, ranks = model.modules[-1], model.parallel.pp
    if len(model.modules) == 1:
        return f"{model.name} has no encoder; use megatron-1f1b or megatron-interleaved"
    if last.layers + 2 < ranks:
        return f"{last.name} has {last.layers + 2} layers, stems and heads for {ranks} stages; lower the pipeline size"
    return None


def _encoders_apart(model: MultimodalModel, microbatches: int) -> str | None:
    if model.parallel.pp < 2:
        return "encoders need ranks of their own; raise the pipeline size"
    return _encoder_on_first(model, microbatches)


def _interleaves(model: MultimodalModel, microbatches: int) -> str | None:
    ranks = model.parallel.pp
    few = _too_few_pieces(model, 2)
    if few is not None or microbatches < ranks:
        return _too_few_pieces(model, 1)  # the same as 1F1B then
    try:
        legal_group(microbatches, ranks)
    except BaselineError as error:
        return str(error)
    return None


DIP = ScheduleEntry(
    "dip", "a plan for each batch: order, split backwards and memory strategies searched", _Search("dip"),
    partition="searched", searches=True, find_set=_dip_set,
)  # fmt: skip
DIP_PAPER = ScheduleEntry(
    "dip-paper", "the DIP paper's own search in three phases", _Search("dip-paper"),
    partition="paper", paper_costs=True, searches=True,
)  # fmt: skip
MEGATRON_1F1B = ScheduleEntry(
    "megatron-1f1b", "Megatron's 1F1B, stages of equal latency", LeastRecompute(_megatron), MixedChunks((1,)),
    refusal=_one_each,
)  # fmt: skip
MEGATRON_INTERLEAVED = ScheduleEntry(
    "megatron-interleaved", "Megatron's interleaved 1F1B with the best number of virtual stages",
    LeastRecompute(_megatron), MixedChunks(), refusal=_interleaves,
)  # fmt: skip
MEGATRON_PARAMETER_BALANCED = ScheduleEntry(
    "megatron-parameter-balanced", "the same with stages of equal parameters", LeastRecompute(_megatron),
    MixedChunks(by_parameters=True, groups=False), refusal=_interleaves,
)  # fmt: skip
ZB_H1 = ScheduleEntry(
    "zb-h1", "zero bubble ZB-H1: 1F1B's memory, weight gradients fill the bubbles", LeastRecompute(_zb_h1),
    MixedChunks((1,)), refusal=_one_each,
)  # fmt: skip
ZB_V = ScheduleEntry(
    "zb-v", "zero bubble ZB-V: two stages a rank, placed in a V", LeastRecompute(_zb_v), MixedChunks((2,), turned=True),
    refusal=_two_each,
)  # fmt: skip
OPTIMUS = ScheduleEntry(
    "optimus", "Optimus at coarse granularity: encoders in the bubbles of the backbone's 1F1B", LeastRecompute(_optimus)
)
NNSCALER = ScheduleEntry(
    "nnscaler", "nnScaler*: Megatron's orders, chosen for the mean batch", LeastRecompute(_megatron),
    MixedChunks(on_mean=True), refusal=_interleaves,
)  # fmt: skip
SEGMENTED_STATIC = ScheduleEntry(
    "segmented-static", "one interleaved order of modality segments for every batch", _segmented_static, ahead=False
)
ENCODER_FIRST_STAGE = ScheduleEntry(
    "encoder-first-stage", "encoders whole on the first stage, the model behind them balanced, Megatron's orders",
    LeastRecompute(_megatron), MixedChunks(encoders="whole"), refusal=_encoder_on_first,
)  # fmt: skip
ENCODERS_FIRST = ScheduleEntry(
    "encoders-first", "all encoder forwards, then 1F1B of the model behind them, then all encoder backwards",
    _encoders_first, ahead=False,
)  # fmt: skip
BIGMAC = ScheduleEntry(
    "bigmac", "encoders nested in the pipeline of the model behind them, a few microbatches ahead", _nested_encoders
)
DISTTRAIN = ScheduleEntry(
    "disttrain", "encoders on pipeline ranks of their own, 1F1B through both", LeastRecompute(_megatron),
    MixedChunks((1,), encoders="apart"), refusal=_encoders_apart,
)  # fmt: skip
