"""Static partitions and the choice among them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core.lower import make_plan
from dip_megatron.core.verify import verify
from dip_megatron.describe.cost import cost_model, load_cluster
from dip_megatron.describe.model import load_model
from dip_megatron.describe.workload import load_workload
from dip_megatron.schedulers.common import BaselineError  # fmt: skip
from dip_megatron.schedulers.registry import find_schedule, schedule_names  # fmt: skip
from dip_megatron.schedulers.static import static_plan, tune_static  # fmt: skip
from dip_megatron.schedulers.static_partition import (
    balance_ranks,
    chain,
    item_parameters,
    item_seconds,
    latency_balanced,
    least_maximum,
    parameter_balanced,
    stage_rank,
    stages_of,
)
from tests.drawn import settings

MODEL = load_model("vlm-s")
PRICER = cost_model(MODEL, load_cluster("h100"))
BATCHES = [b.microbatches for b in load_workload("vlm-mix", MODEL, iterations=2, microbatches=8)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=9), st.integers(1, 5))
def test_least_maximum_is_optimal(weights, parts):
    weights = np.array(weights)
    if parts > len(weights):
        with pytest.raises(ValueError, match="can't be cut"):
            least_maximum(weights, parts)
        return
    sizes = least_maximum(weights, parts)
    assert sum(sizes) == len(weights)
    assert min(sizes) >= 1
    greatest = max(run.sum() for run in np.split(weights, np.cumsum(sizes)[:-1]))
    every = (
        max(run.sum() for run in np.split(weights, cuts)) for cuts in combinations(range(1, len(weights)), parts - 1)
    )
    assert greatest == pytest.approx(min(every))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 10.0), min_size=12, max_size=30), st.integers(1, 3), st.booleans())
def test_balancing_ranks_never_makes_the_busiest_busier(weights, segments, turned):
    weights, ranks = np.array(weights), 4

    def busiest(sizes):
        stages = [run.sum() for run in np.split(weights, np.cumsum(sizes)[:-1])]
        return max(sum(t for v, t in enumerate(stages) if stage_rank(v, ranks, turned) == r) for r in range(ranks))

    before = least_maximum(weights, segments * ranks)
    after = balance_ranks(weights, before, ranks, turned)
    assert sum(after) == len(weights)
    assert min(after) >= 1
    assert busiest(after) <= busiest(before) + 1e-9


def test_the_chain_holds_the_whole_model():
    items = chain(MODEL)
    assert len(items) == sum(m.layers + 2 for m in MODEL.modules)
    assert item_parameters(MODEL).sum() == pytest.approx(MODEL.parameters)
    seconds = item_seconds(PRICER, BATCHES[0])
    assert len(seconds) == len(items)
    assert np.all(seconds > 0)
    stages = stages_of(MODEL, least_maximum(seconds, 8))
    assert sum(run.layers for stage in stages for run in stage) == sum(m.layers for m in MODEL.modules)
    assert sum(run.stem for stage in stages for run in stage) == len(MODEL.modules)
    assert stages[-1][-1].head
    assert stages[0][0].stem


def test_parameter_balance_is_not_latency_balance():
    seconds = item_seconds(PRICER, BATCHES[0])
    (by_latency, *_) = latency_balanced(seconds, MODEL, 1)
    by_parameters = parameter_balanced(MODEL, 1)
    assert by_latency != by_parameters
    parameters = item_parameters(MODEL)

    def greatest(stages, weights):
        sizes = [sum(run.layers + run.stem + run.head for run in stage) for stage in stages]
        return max(run.sum() for run in np.split(weights, np.cumsum(sizes)[:-1]))

    assert greatest(by_latency, seconds) < greatest(by_parameters, seconds)
    assert greatest(by_parameters, parameters) < greatest(by_latency, parameters)


@pytest.mark.parametrize("name", [name for name in schedule_names() if find_schedule(name).mixed])
def test_every_static_baseline_gives_plans_that_verify(name):
    limit = 300e9  # zero bubble without recompute of its own needs more than a GPU has
    choice = tune_static(name, PRICER, BATCHES[:1], limit)
    for microbatches in BATCHES:
        graph, fitted = static_plan(PRICER, choice, microbatches, limit)
        assert fitted.fits
        plan = make_plan(graph, fitted.schedule, lower_bound=0.0, name=name)
        assert plan.predicted.iteration_time == fitted.timeline.iteration_time
        verify(plan)
    assert bool(choice.modules[0].reversed) == (name == "zb-v") == any(graph.modules[0].reversed)


def test_the_best_latency_balance_beats_the_other_static_partitions():
    times = {}
    for name in ("megatron-1f1b", "megatron-interleaved", "megatron-parameter-balanced"):
        choice = tune_static(name, PRICER, BATCHES[:1], 300e9)
        times[name] = static_plan(PRICER, choice, BATCHES[0], 300e9)[1].timeline.iteration_time
    assert times["megatron-interleaved"] < min(times["megatron-1f1b"], times["megatron-parameter-balanced"])


def test_memory_forces_recompute_and_then_does_not_fit():
    choice = tune_static("megatron-1f1b", PRICER, BATCHES[:1])
    free, tight, hopeless = (static_plan(PRICER, choice, BATCHES[0], limit)[1] for limit in (1e13, 76e9, 1e9))
    assert free.strategy < tight.strategy <= hopeless.strategy
    assert (free.fits, tight.fits, hopeless.fits) == (True, True, False)
    assert free.timeline.iteration_time < tight.timeline.iteration_time


def test_fewer_microbatches_than_ranks_leave_1f1b_only():
    few = [BATCHES[0][:2]]
    assert tune_static("megatron-interleaved", PRICER, few).modules[0].segments == 1
    wide = cost_model(MODEL.with_parallel(pp=1, tp=8), load_cluster("h100"))
    assert tune_static("megatron-interleaved", wide, few).modules[0].segments == 1
    choice = tune_static("megatron-interleaved", PRICER, BATCHES[:1])
    assert choice.modules[0].segments > 1
    with pytest.raises(BaselineError, match="at least 4"):
        static_plan(PRICER, choice, few[0])
