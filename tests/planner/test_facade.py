"""Training and the command plan alike: one facade, equal inputs, equal plans."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dip_megatron.config import DipConfig
from dip_megatron.core import TensorSpec
from dip_megatron.core.verify import verify
from dip_megatron.describe.cost import load_cluster
from dip_megatron.describe.model import load_model
from dip_megatron.describe.workload import load_workload
from dip_megatron.planner.facade import Effort, Setting, choose_chunks, live_maker, make_planner
from dip_megatron.planner.partitioning import paper_partition
from dip_megatron.planner.request import PlanRequest
from dip_megatron.planner.searchers import live_effort
from dip_megatron.schedulers.registry import find_schedule, schedule_names

MODEL = load_model("vlm-s").with_parallel(pp=2)
BATCHES = load_workload("vlm-mix", MODEL, iterations=2, microbatches=4)
SETTING = Setting(MODEL, load_cluster("h100"), BATCHES, memory_limit=300e9)
PARTITION = paper_partition(MODEL, SETTING.cluster, BATCHES)


class NoShapes:
    """Every message carries one number."""

    def payload(self, unit, load, *, leaves_module):
        return (TensorSpec("hidden", (1,), "float32"),)


@pytest.mark.parametrize("name", schedule_names())
def test_training_and_the_command_make_the_same_plan(name):
    effort = Effort(budget_seconds=600.0, seed=3, evaluations=300, deterministic=True)
    planner = make_planner(name, SETTING, effort, PARTITION)
    config = DipConfig(schedule=name, search_evaluations=300, search_seed=3, offload=True, planner_workers=2)
    entry = find_schedule(name)
    graphs = SETTING.graphs(entry, choose_chunks(entry, SETTING, effort, PARTITION))
    maker = live_maker(entry, graphs, NoShapes(), live_effort(config))
    for batch in BATCHES:
        theirs = planner(batch.microbatches)
        wanted = replace(theirs.plan(), payloads={})
        for made in (
            maker.quick(PlanRequest(1, (batch.microbatches,), 0.0)),
            maker.best(PlanRequest(1, (batch.microbatches,), 600.0), lambda _: None),
        ):
            (ours,) = made.plans
            verify(ours)
            assert ours.name == name
            assert replace(ours, payloads={}).digest() == wanted.digest()
            assert ours.predicted.iteration_time == theirs.iteration_time
            assert ours.predicted.lower_bound <= theirs.lower_bound * (1 + 1e-12)


def test_an_evaluation_needs_no_search():
    entry = find_schedule("megatron-interleaved")
    graphs = SETTING.graphs(entry, choose_chunks(entry, SETTING, Effort()))
    maker = live_maker(entry, graphs, NoShapes(), Effort())
    (plan,) = maker.quick(PlanRequest(1, (BATCHES[0].microbatches[:1],), 0.0, forward_only=True)).plans
    verify(plan)  # Megatron's order could not run one microbatch
    assert plan.name == "greedy"
