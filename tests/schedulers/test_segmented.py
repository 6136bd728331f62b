"""Static orders over modality-segmented graphs, and the least recompute that fits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Kind, check_complete
from dip_megatron.core.lower import make_plan
from dip_megatron.core.simulate import simulate
from dip_megatron.core.verify import verify
from dip_megatron.describe.cost import cost_model, load_cluster, priced_graph
from dip_megatron.describe.model import even_partition, load_model
from dip_megatron.describe.workload import load_workload
from dip_megatron.schedulers.common import BaselineError  # fmt: skip
from dip_megatron.schedulers.fit import least_recompute, least_recompute_by_module  # fmt: skip
from dip_megatron.schedulers.megatron import interleaved, one_forward_one_backward  # fmt: skip
from dip_megatron.schedulers.optimus import optimus_coarse, optimus_leads  # fmt: skip
from dip_megatron.schedulers.segmented import segmented_static  # fmt: skip
from tests.drawn import settings

from ..graphs import paper_graph, random_graph
from .mixed import mixed_graph


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_static_orders_end_and_verify(seed):
    graph = random_graph(seed, memory=np.inf)
    schedules = [segmented_static(graph)]
    if any(any(m.reversed) for m in graph.modules):
        with pytest.raises(BaselineError, match="reversed"):
            optimus_coarse(graph)
    else:
        schedules.append(optimus_coarse(graph))
    for schedule in schedules:
        assert check_complete(graph, schedule) is None
        verify(make_plan(graph, schedule, lower_bound=0.0))


@pytest.mark.parametrize("segments", [{"language": 5, "diffusion": 4}, {"language": 1, "diffusion": 3}])
def test_many_segments_around_an_interleaved_backbone_end(segments):
    model = load_model("t2v-s")
    (batch,) = load_workload("t2v-mix", model, iterations=1, microbatches=16)
    graph = priced_graph(cost_model(model, load_cluster("h100")), even_partition(model, segments), batch.microbatches)
    for schedule in [*optimus_leads(graph), segmented_static(graph)]:
        verify(make_plan(graph, schedule, lower_bound=0.0))


def test_one_module_gives_megatrons_interleaved_order():
    graph = mixed_graph(4, 12, 3)
    for a, b in zip(segmented_static(graph).orders, interleaved(graph).orders, strict=True):
        assert a.tolist() == b.tolist()


@pytest.mark.parametrize("name", ["vlm-s", "t2v-s"])
def test_optimus_keeps_the_backbones_order_and_beats_encoders_first(name):
    graph = paper_graph(name, limited=False, candidates=1)
    schedule = optimus_coarse(graph)
    backbone = graph.modules[-1].name
    for rank in range(graph.ranks):
        kept = [k for k in schedule.operations(graph, rank) if k.module == backbone]
        warmup = graph.ranks - rank - 1
        assert [k.kind for k in kept[: warmup + 2]] == [Kind.F] * (warmup + 1) + [Kind.BW]
        forwards = [k.unit for k in kept if k.kind == Kind.F]
        assert forwards == sorted(forwards)
    times = [simulate(graph, s).iteration_time for s in optimus_leads(graph)]
    assert simulate(graph, schedule).iteration_time == min(times) <= times[-1]


def test_leads_bound_the_encoder_forwards_ahead():
    graph = paper_graph("vlm-s", limited=False, candidates=1)
    peaks = [simulate(graph, s).peak_bytes.max() for s in optimus_leads(graph)]
    assert peaks[0] < peaks[-1]


def test_least_recompute_takes_the_first_strategy_that_fits():
    def build(graph):
        return [one_forward_one_backward(graph)]

    free = least_recompute(mixed_graph(4, 8, recompute=0.5), build)
    tight = least_recompute(mixed_graph(4, 8, recompute=0.5, limit=3.5), build)
    hopeless = least_recompute(mixed_graph(4, 8, recompute=0.5, limit=0.2), build)
    assert (free.strategy, free.fits) == (0, True)
    assert (tight.strategy, tight.fits) == (1, True)
    assert (hopeless.strategy, hopeless.fits) == (1, False)
    assert tight.timeline.iteration_time == pytest.approx(free.timeline.iteration_time + 11 * 0.5)
    assert np.all(tight.timeline.peak_bytes <= 3.5)
    graph = mixed_graph(4, 8, recompute=0.5, limit=3.5)
    assert simulate(graph, tight.schedule).iteration_time == tight.timeline.iteration_time


def test_each_module_may_recompute_by_itself():
    graph = paper_graph("vlm-s")
    free = simulate(graph, segmented_static(graph)).peak_bytes
    gains = []
    for share in (0.5, 0.7, 0.9):
        limit = graph.static_bytes + share * (free - graph.static_bytes)
        tight = dataclasses.replace(graph, memory_limit=limit)
        uniform = least_recompute(tight, lambda g: [segmented_static(g)])
        fitted = least_recompute_by_module(tight, segmented_static)
        assert fitted.fits
        assert np.all(fitted.timeline.peak_bytes <= limit)
        assert simulate(tight, fitted.schedule).iteration_time == fitted.timeline.iteration_time
        chosen: dict[str, set[int]] = {}
        for row, strategies in enumerate(fitted.schedule.strategy):
            chosen.setdefault(tight.units[int(tight.unit_of[row])].module, set()).update(strategies.tolist())
        assert [len(strategies) for strategies in chosen.values()] == [1, 1]
        gains.append(uniform.timeline.iteration_time / fitted.timeline.iteration_time)
    assert min(gains) >= 1.0
    assert max(gains) > 1.01
