"""What teams do today with encoders, as schedules: where encoders stand, when they run, and what they hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dip_megatron.core.operations import Kind
from dip_megatron.core.verify import verify
from dip_megatron.describe.cost import load_cluster
from dip_megatron.describe.model import load_model
from dip_megatron.describe.workload import load_workload
from dip_megatron.planner.facade import Effort, Setting, make_planner
from dip_megatron.planner.partitioning import paper_partition
from dip_megatron.schedulers.registry import find_schedule
from dip_megatron.schedulers.static import tune_static

MODEL = load_model("vlm-s")
H100 = load_cluster("h100")


def planned(name: str, microbatches: int, model=MODEL, mix: str = "vlm-mix"):
    batches = load_workload(mix, model, 1, microbatches)
    setting = Setting(model, H100, batches, memory_limit=300e9)
    partition = paper_partition(model, H100, batches)
    return make_planner(name, setting, Effort(), partition)(batches[0].microbatches)


def encoders_held(found, rank: int) -> int:
    """Most microbatches whose encoder stages a rank holds at once."""
    graph, count = found.graph, found.graph.virtual_microbatches
    held: set[int] = set()
    most = 0
    for operation in found.schedule.orders[rank].tolist():
        kind, s = divmod(operation, count)
        unit = graph.units[int(graph.unit_of[s])]
        if unit.module == "language":
            continue
        if kind == int(Kind.F):
            held.add(unit.microbatch)
        else:
            held.discard(unit.microbatch)
        most = max(most, len(held))
    return most


@pytest.mark.parametrize("name", ["encoders-first", "bigmac"])
@pytest.mark.parametrize(("microbatches", "model"), [(3, "vlm-s"), (8, "vlm-s"), (9, "vision-audio-llm")])
def test_plans_verify_with_few_microbatches_and_many(name, microbatches, model):
    mix = "vision-audio-mix" if "audio" in model else "vlm-mix"
    found = planned(name, microbatches, load_model(model).with_parallel(pp=2), mix)
    verify(found.plan())
    assert found.fits


def test_all_encoders_run_before_and_after_the_pipeline_of_the_language_model():
    found = planned("encoders-first", 8)
    graph, count = found.graph, found.graph.virtual_microbatches
    for line in found.schedule.orders:
        modules = [graph.units[int(graph.unit_of[o % count])].module for o in line.tolist()]
        first, last = modules.index("language"), len(modules) - modules[::-1].index("language")
        assert set(modules[first:last]) == {"language"}
        assert "vision" in modules[:first]
        assert "vision" in modules[last:]


def test_nested_encoders_hold_no_more_of_a_larger_batch():
    few, many = planned("bigmac", 16), planned("bigmac", 40)
    for rank in range(MODEL.parallel.pp):
        assert encoders_held(many, rank) <= max(encoders_held(few, rank), 6 * MODEL.parallel.pp)
    assert encoders_held(planned("encoders-first", 40), 0) > 6 * MODEL.parallel.pp


def test_encoders_stand_whole_on_the_first_stage_or_on_ranks_of_their_own():
    setting = Setting(MODEL, H100, load_workload("vlm-mix", MODEL, 1, 8))
    batch = [setting.batches[0].microbatches]
    whole = tune_static("encoder-first-stage", setting.pricer, batch, 300e9)
    assert sum(run.layers for run in whole.modules[0].stages[0] if run.module == "vision") == 63
    assert any(run.module == "language" and run.stem for run in whole.modules[0].stages[0])
    language = [sum(r.layers for r in stage if r.module == "language") for stage in whole.modules[0].stages]
    assert language[0] < np.mean(language)  # balanced behind it
    apart = tune_static("disttrain", setting.pricer, batch, 300e9)
    assert all(len({run.module for run in stage}) == 1 for stage in apart.modules[0].stages)
    assert (apart.modules[0].stages[0][0].module, apart.modules[0].stages[-1][0].module) == ("vision", "language")


@pytest.mark.parametrize(("name", "why"), [("encoder-first-stage", "has no encoder"), ("disttrain", "has no encoder")])
def test_a_model_without_encoders_is_refused_in_a_line(name, why):
    text = MODEL.module("language")
    alone = replace(MODEL, modules=(replace(text, upstream=()),))
    assert why in str(find_schedule(name).refusal(alone, 8))
    assert find_schedule(name).refusal(MODEL, 8) is None
    assert "raise the pipeline size" in str(find_schedule("disttrain").refusal(MODEL.with_parallel(pp=1), 8))
