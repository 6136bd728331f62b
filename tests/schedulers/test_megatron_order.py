"""Megatron's orders, compared with Megatron-Core's own code."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Kind, check_complete
from dip_megatron.core.lower import make_plan
from dip_megatron.core.simulate import simulate
from dip_megatron.core.verify import verify
from dip_megatron.schedulers.common import BaselineError
from dip_megatron.schedulers.megatron import (
    check_group,
    interleaved,
    legal_group,
    one_forward_one_backward,
    schedule_table,
    warmup_count,
)
from tests.drawn import settings

from .mixed import mixed_graph

schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")

SHAPES = [(p, v, n) for p in (2, 3, 4, 8) for v in (2, 3, 4) for n in (p, 2 * p, 2 * p + 1, 3 * p + 1, 4 * p)]


def upstream_counts(monkeypatch, ranks: int, rank: int, microbatches: int, segments: int, group: int):
    """(total, all in warm-up, warm-up, remaining), from either signature that upstream has had."""
    state = schedules.parallel_state
    monkeypatch.setattr(state, "get_pipeline_model_parallel_world_size", lambda: ranks)
    monkeypatch.setattr(state, "get_pipeline_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(
        state, "get_virtual_pipeline_model_parallel_world_size", lambda: segments if segments > 1 else None
    )
    return schedules.get_pp_rank_microbatches(microbatches, segments, group)


def upstream_order(monkeypatch, ranks, rank, microbatches, segments, group) -> list[tuple[str, int, int]]:
    """(kind, chunk, microbatch) as ``forward_backward_pipelining_with_interleaving`` runs them, helper by helper."""
    total, _, warmup, remaining = upstream_counts(monkeypatch, ranks, rank, microbatches, segments, group)
    microbatch_ids, chunk_ids = zip(*schedules.get_schedule_table(microbatches, segments, group), strict=True)
    # Megatron appends each forward's input to its chunk's list and pops the oldest in the chunk's backward.
    waiting: list[list[int]] = [[] for _ in range(segments)]
    order = []

    def forward(k: int) -> None:
        chunk = chunk_ids[k % total]
        waiting[chunk].append(microbatch_ids[k])
        order.append(("F", chunk, microbatch_ids[k]))

    def backward(k: int) -> None:
        chunk = segments - chunk_ids[k % total] - 1
        order.append(("BW", chunk, waiting[chunk].pop(0)))

    for k in range(warmup):
        forward(k)
    for k in range(remaining):
        forward(k + warmup)
        backward(k)
    for k in range(remaining, total):
        backward(k)
    return order


def ours(graph, schedule, rank) -> list[tuple[str, int, int]]:
    return [(k.kind.name, k.segment, k.unit) for k in schedule.operations(graph, rank)]


@pytest.mark.parametrize(("ranks", "segments", "microbatches"), SHAPES)
def test_interleaved_is_megatrons_order(monkeypatch, ranks, segments, microbatches):
    group = legal_group(microbatches, ranks)
    graph = mixed_graph(ranks, microbatches, segments)
    schedule = interleaved(graph)
    assert check_complete(graph, schedule) is None
    assert schedule_table(microbatches, segments, group) == schedules.get_schedule_table(microbatches, segments, group)
    for rank in range(ranks):
        assert ours(graph, schedule, rank) == upstream_order(monkeypatch, ranks, rank, microbatches, segments, group)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 1), (4, 2), (4, 4), (4, 9), (8, 16)])
def test_1f1b_is_megatrons_order(monkeypatch, ranks, microbatches):
    graph = mixed_graph(ranks, microbatches)
    schedule = one_forward_one_backward(graph)
    for rank in range(ranks):
        _, _, warmup, remaining = upstream_counts(monkeypatch, ranks, rank, microbatches, 1, ranks)
        expected = [("F", 0, m) for m in range(warmup)]
        for i in range(remaining):
            expected += [("F", 0, warmup + i), ("BW", 0, i)]
        expected += [("BW", 0, i) for i in range(remaining, microbatches)]
        assert ours(graph, schedule, rank) == expected


@given(st.integers(1, 8), st.integers(2, 4), st.integers(1, 40), st.integers(1, 40))
def test_groups_are_legal_where_megatron_says_so(ranks, segments, microbatches, group):
    # The two conditions of forward_backward_pipelining_with_interleaving.
    legal = ranks <= group <= microbatches and not 0 < microbatches % group < ranks
    if legal:
        check_group(microbatches, ranks, group)
        assert legal_group(microbatches, ranks) <= group
        assert 0 <= warmup_count(microbatches, segments, ranks, ranks - 1, group) <= microbatches * segments
    else:
        with pytest.raises(BaselineError):
            check_group(microbatches, ranks, group)


def test_illegal_batches_name_the_way_out():
    with pytest.raises(BaselineError, match="at least 4"):
        interleaved(mixed_graph(4, 3, 2))
    with pytest.raises(BaselineError, match="multiple of 4"):
        interleaved(mixed_graph(4, 6, 2), group=4)
    with pytest.raises(BaselineError, match="interleaved"):
        one_forward_one_backward(mixed_graph(4, 8, 2))


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_bubble_is_the_textbook_one(segments):
    # (P - 1)(F + B) / V of idle time per rank, Narayanan et al. 2021, section 2.2.
    ranks, microbatches = 4, 16
    graph = mixed_graph(ranks, microbatches, segments, times=(1.0, 1.0, 1.0))
    schedule = one_forward_one_backward(graph) if segments == 1 else interleaved(graph)
    timeline = simulate(graph, schedule)
    assert timeline.iteration_time == pytest.approx(3 * microbatches + (ranks - 1) * 3 / segments)
    assert timeline.peak_bytes[0] == pytest.approx(4 if segments == 1 else (segments * 4 + 3) / segments)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_orders_end_and_verify_on_uneven_batches(ranks, segments, microbatches, seed):
    scale = np.random.default_rng(seed).uniform(0.2, 3.0, microbatches)
    graph = mixed_graph(ranks, microbatches, segments, scale=scale, transfer=0.01)
    if segments > 1 and (microbatches < ranks or ranks == 1):
        with pytest.raises(BaselineError):
            interleaved(graph)
        return
    schedule = one_forward_one_backward(graph) if segments == 1 else interleaved(graph)
    assert {int(c) // graph.virtual_microbatches for order in schedule.orders for c in order} == {
        int(Kind.F),
        int(Kind.BW),
    }
    verify(make_plan(graph, schedule, lower_bound=0.0))
