"""What every search must hold, whatever the graph."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Kind, OperationGraph, Schedule, check_complete
from dip_megatron.core.bounds import lower_bound
from dip_megatron.core.lower import make_plan
from dip_megatron.core.simulate import simulate
from dip_megatron.core.verify import verify
from dip_megatron.describe.cost import build_graph, load_cluster
from dip_megatron.describe.model import ModulePartition, Partition, load_model
from dip_megatron.describe.workload import load_workload
from dip_megatron.schedulers.common import BaselineError
from dip_megatron.schedulers.dip.engine import search
from dip_megatron.schedulers.dip.feasibility import DoesNotFitError
from dip_megatron.schedulers.dip.options import SearchOptions, SearchResult
from dip_megatron.schedulers.greedy import greedy
from dip_megatron.schedulers.segmented import segmented_static
from tests.drawn import settings
from tests.graphs import paper_graph, random_graph, small_graphs, with_memory


def check(graph: OperationGraph, result: SearchResult) -> None:
    """The schedule is complete, ends, fits, takes what it says, and no less than the bound."""
    assert check_complete(graph, result.schedule) is None
    timeline = simulate(graph, result.schedule)
    assert timeline.iteration_time == result.iteration_time
    assert np.all(timeline.peak_bytes <= graph.memory_limit)
    assert result.lower_bound <= result.iteration_time
    times = [t for _, t in result.history]
    assert times == sorted(times, reverse=True)
    assert times[-1] == result.iteration_time


@settings(max_examples=150, deadline=None)
@given(small_graphs(), st.sampled_from(["dip", "dip-paper"]), st.integers(0, 99))
def test_every_plan_is_valid(graph: OperationGraph, schedule: str, seed: int) -> None:
    check(graph, search(graph, schedule=schedule, budget_seconds=60, evaluations=60, seed=seed))


@settings(max_examples=60, deadline=None)
@given(small_graphs(microbatches=6, memory=1.0))
def test_tight_memory_never_locks_up(graph: OperationGraph) -> None:
    check(graph, search(graph, budget_seconds=60, evaluations=40))


@settings(max_examples=40, deadline=None)
@given(small_graphs(), st.integers(0, 99))
def test_deterministic_whatever_the_workers(graph: OperationGraph, seed: int) -> None:
    results = [
        search(graph, budget_seconds=0, evaluations=300, seed=seed, workers=w, deterministic=True) for w in (1, 2)
    ]
    assert results[0].iteration_time == results[1].iteration_time
    assert all(np.array_equal(a, b) for a, b in zip(*(r.schedule.orders for r in results), strict=True))
    assert np.array_equal(results[0].schedule.strategy, results[1].schedule.strategy)


@pytest.mark.parametrize("schedule", ["dip", "dip-paper"])
def test_repeats_with_the_same_seed(schedule: str) -> None:
    graph = paper_graph("t2v-s", microbatches=8)
    times = [
        search(graph, schedule=schedule, budget_seconds=0, evaluations=400, seed=5, deterministic=True).iteration_time
        for _ in range(2)
    ]
    assert times[0] == times[1]


@settings(max_examples=60, deadline=None)
@given(small_graphs(candidates=1, memory=float("inf")))
def test_never_worse_than_megatrons_order(graph: OperationGraph) -> None:
    try:
        static = segmented_static(graph)
    except BaselineError:
        return
    result = search(graph, budget_seconds=60, evaluations=1)
    assert result.iteration_time <= simulate(graph, static).iteration_time


@settings(max_examples=50, deadline=None)
@given(small_graphs(memory=0.97))
def test_says_what_is_missing(graph: OperationGraph) -> None:
    """Just under the smallest need nothing fits; the error names the rank and the bytes; with these it fits."""
    with pytest.raises(DoesNotFitError, match=r"rank \d+ is short of .* GiB .*memory") as caught:
        search(graph, budget_seconds=60, evaluations=10)
    limit = graph.memory_limit.copy()
    short: DoesNotFitError | None = caught.value
    named: list[int] = []
    while short is not None:
        assert short.rank not in named
        named.append(short.rank)
        limit[short.rank] += short.missing
        enlarged = replace(graph, memory_limit=limit.copy())
        short = missing(enlarged)
    check(enlarged, search(enlarged, budget_seconds=60, evaluations=10))


def missing(graph: OperationGraph) -> DoesNotFitError | None:
    """What a search of ``graph`` complains of."""
    try:
        search(graph, budget_seconds=60, evaluations=1)
    except DoesNotFitError as error:
        return error
    return None


def test_options_switch_things_off() -> None:
    graph = paper_graph("vlm-s", microbatches=10)
    assert (graph.memory_limit - graph.static_bytes < graph.activation[0].sum(axis=0)).any()
    whole = search(graph, budget_seconds=60, evaluations=300, options=SearchOptions(split_backward=False))
    assert not any(int(c) // graph.virtual_microbatches in (Kind.W,) for o in whole.schedule.orders for c in o)
    assert whole.lower_bound == lower_bound(graph, split=False) >= lower_bound(graph)
    fastest = search(graph, budget_seconds=60, evaluations=300, options=SearchOptions(recompute=False))
    assert not fastest.schedule.strategy.any()
    check(graph, fastest)
    names = tuple(
        tuple(("none", "offload:1", "full:1") for _ in range(graph.ranks)) for _ in range(graph.virtual_microbatches)
    )
    named = replace(with_memory(graph, 1.2), strategies=names)
    for options, banned in ((SearchOptions(offload=False), 1), (SearchOptions(recompute=False), 2)):
        try:
            result = search(named, budget_seconds=60, evaluations=200, options=options)
        except DoesNotFitError:
            assert banned == 2  # offload alone frees less
        else:
            assert banned not in result.schedule.strategy
            check(named, result)


def test_threads_share_and_report_improvements() -> None:
    graph = paper_graph("t2v-s", microbatches=6)
    seen: list[float] = []
    result = search(
        graph, budget_seconds=60, evaluations=2000, workers=2, on_improved=lambda s, t: seen.append(t), seed=3
    )
    check(graph, result)
    assert seen == [t for _, t in result.history]
    assert all(a > b for a, b in itertools.pairwise(seen))


def test_warm_start_is_never_lost() -> None:
    graph = random_graph(11, ranks=3, microbatches=4, memory=1.5)
    best = search(graph, budget_seconds=60, evaluations=3000)
    again = search(graph, budget_seconds=0, evaluations=1, warm_start=best.schedule)
    assert again.iteration_time <= best.iteration_time


def test_bad_arguments_are_named() -> None:
    graph = random_graph(1)
    with pytest.raises(ValueError, match="choose dip or dip-paper"):
        search(graph, schedule="best", budget_seconds=1)
    with pytest.raises(ValueError, match="needs a number of evaluations"):
        search(graph, budget_seconds=1, deterministic=True)
    empty = Schedule(tuple(np.zeros(0, dtype=np.int32) for _ in range(graph.ranks)), np.zeros((1, 1), dtype=np.int8))
    with pytest.raises(ValueError, match="warm start is no schedule of this graph"):
        search(graph, budget_seconds=1, warm_start=empty)


def test_stages_that_may_hold_nothing_keep_their_place_in_line():
    """Offloading leaves no bytes; a sink that claims none must not count as ended before its forwards have run."""
    model = load_model("t2v-s")
    parts = (ModulePartition("language", ((7, 9, 9, 7),), None), ModulePartition("diffusion", ((7, 7, 7, 7),), 1))
    batch = load_workload("t2v-768", model, 1, 16, 0)[0]
    graph = build_graph(model, load_cluster("h100"), Partition(parts), batch.microbatches)
    assert (graph.activation == 0.0).any()
    result = search(graph, budget_seconds=60.0, evaluations=230, deterministic=True)
    verify(make_plan(graph, result.schedule, lower_bound=result.lower_bound))
    verify(make_plan(graph, greedy(graph), lower_bound=0.0))
