"""ZB-H1 and ZB-V: the papers' bubbles and memory, and PyTorch's own ZB-V order."""

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
from dip_megatron.schedulers.megatron import one_forward_one_backward
from dip_megatron.schedulers.zero_bubble import automatic, handcrafted_h1, handcrafted_v, zb_h1, zb_v
from tests.drawn import settings
from tests.graphs import predecessors

from .mixed import mixed_graph


@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), (1.0, 1.1, 0.9), (1.0, 1.2, 0.7)])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_h1_has_the_papers_bubble_and_memory(ranks, times):
    # Table 1 of Qi et al.: 1F1B idles (P-1)(F+B+W), ZB-H1 (P-1)(F+B-W), with the same peak.
    forward, backward, weight = times
    microbatches = 3 * ranks
    graph = mixed_graph(ranks, microbatches, times=times)
    plain, split = simulate(graph, one_forward_one_backward(graph)), simulate(graph, zb_h1(graph))
    work = microbatches * sum(times)
    assert plain.iteration_time == pytest.approx(work + (ranks - 1) * sum(times))
    # The table takes B = W for granted; a longer B adds its surplus once more for each rank.
    assert split.iteration_time <= work + (ranks - 1) * (forward + backward - weight + abs(backward - weight)) + 1e-9
    assert split.peak_bytes.max() <= plain.peak_bytes.max() + 1e-9


def test_h1_with_equal_times_is_exact():
    graph = mixed_graph(4, 12)
    for schedule in (zb_h1(graph), handcrafted_h1(graph)):
        assert simulate(graph, schedule).iteration_time == pytest.approx(12 * 3 + 3 * 1)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_v_has_no_bubble_with_equal_times(ranks):
    microbatches = 2 * ranks + 3
    graph = mixed_graph(ranks, microbatches, 2, turned=True)
    schedule = zb_v(graph)
    timeline = simulate(graph, schedule)
    for start, end in zip(timeline.start, timeline.end, strict=True):
        assert end[-1] - start[0] == pytest.approx(3 * microbatches)
    assert timeline.peak_bytes.max() <= ranks + 1e-9


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 3), (2, 8), (4, 3), (4, 7), (4, 16), (8, 20)])
def test_v_is_pytorchs_order(ranks, microbatches):
    pipelining = pytest.importorskip("torch.distributed.pipelining.schedules")
    if not hasattr(pipelining, "ScheduleZBVZeroBubble"):
        pytest.skip("this PyTorch has no ZB-V")
    theirs = object.__new__(pipelining.ScheduleZBVZeroBubble)
    theirs.pp_group_size, theirs.num_stages, theirs._n_microbatches = ranks, 2 * ranks, microbatches
    graph = mixed_graph(ranks, microbatches, 2, turned=True)
    schedule = handcrafted_v(graph)
    letters = {"F": "F", "I": "B", "W": "W"}
    for rank in range(ranks):
        expected = [
            (letters[action.computation_type.value], int(action.stage_index != rank), action.microbatch_index)
            for action in theirs._calculate_single_rank_operations(rank)
            if action is not None
        ]
        assert [(k.kind.name, k.segment, k.unit) for k in schedule.operations(graph, rank)] == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.booleans(), st.integers(0, 2**32 - 1))
def test_every_order_ends_and_verifies(ranks, microbatches, turned, seed):
    rng = np.random.default_rng(seed)
    times = tuple(rng.uniform(0.3, 2.0, 3))
    graph = mixed_graph(
        ranks, microbatches, 2 if turned else 1, turned=turned, times=times, scale=rng.uniform(0.2, 3.0, microbatches),
        transfer=0.01,
    )  # fmt: skip
    limit = 2 * ranks if turned else ranks
    choices = (
        [zb_v(graph), handcrafted_v(graph)]
        if turned
        else [zb_h1(graph), handcrafted_h1(graph), handcrafted_h1(graph, delay=1)]
    )
    for schedule in [*choices, automatic(graph, limit), automatic(graph, limit, eager=True)]:
        assert check_complete(graph, schedule) is None
        verify(make_plan(graph, schedule, lower_bound=0.0))


def test_automatic_stays_within_its_limit():
    graph = mixed_graph(4, 12, times=(1.0, 1.6, 0.5))
    for limit in (1, 2, 4):
        assert simulate(graph, automatic(graph, limit)).peak_bytes.max() <= limit


def test_eager_weight_gradients_hold_less():
    graph = mixed_graph(4, 12, times=(1.0, 1.6, 0.5))
    for rank, order in enumerate(automatic(graph, 4, eager=True).orders):
        kinds = [int(code) // graph.virtual_microbatches for code in order]
        assert all(kinds[i + 1] == Kind.W for i, kind in enumerate(kinds) if kind == Kind.B), rank


def test_automatic_helps_where_the_times_differ():
    graph = mixed_graph(4, 16, times=(1.0, 1.8, 0.6))
    best = simulate(graph, zb_h1(graph)).iteration_time
    assert best <= simulate(graph, handcrafted_h1(graph)).iteration_time
    assert best < simulate(graph, one_forward_one_backward(graph)).iteration_time


def test_graphs_of_the_wrong_shape_are_refused():
    with pytest.raises(BaselineError, match="two segments"):
        zb_v(mixed_graph(2, 4, 2))
    with pytest.raises(BaselineError, match="one chunk"):
        zb_h1(mixed_graph(2, 4, 2))


def test_reversed_segment_starts_where_the_first_one_ends():
    graph = mixed_graph(3, 1, 2, turned=True, transfer=0.5)
    turn = graph.operation(Kind.F, 1, 2)
    assert predecessors(graph, turn) == (graph.operation(Kind.F, 0, 2),)
    # Down over two transfers, none at the turn, and up again; the same way back, with a W at the turn and at the end.
    one_way = 6 * 0.5 + 4 * 0.5
    assert simulate(graph, handcrafted_v(graph)).iteration_time == pytest.approx(2 * one_way + 2 * 0.5)
