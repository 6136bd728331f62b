"""A modality that the package has never heard of: point clouds, described, drawn, priced, planned, written and read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dip_megatron.core.files import read_plans, write_plans
from dip_megatron.core.lower import make_plan
from dip_megatron.core.verify import verify
from dip_megatron.describe.cost import CostModel, load_cluster, priced_graph
from dip_megatron.describe.cost.sizes import unit_sizes
from dip_megatron.describe.model import load_model
from dip_megatron.describe.workload import (
    GlobalBatch,
    Microbatch,
    WorkloadError,
    load_workload,
    make_units,
    write_workload,
)
from dip_megatron.planner.partitioning import choose_partition
from dip_megatron.schedulers.dip.engine import search

MODEL = """
name: lidar
parallel: {tp: 1, pp: 2, dp: 1}
packing: {max_tokens: 2048, max_images: 8, image_tokens: 64}
modules:
  vision:
    input: images
    layers: 4
    layer: {hidden: 256, ffn: 1024, heads: 4, kv_groups: 4}
    stem: {kind: patch_embedding, patch: 14}
    head: {kind: projector, reduction: 4, inner: 512, output: 512}
  points:
    input: point_clouds
    layers: 2
    layer: {hidden: 128, ffn: 512, heads: 4, kv_groups: 4}
    stem: {kind: feature_embedding, features: 96}
    head: {kind: projector, reduction: 2, inner: 512, output: 512}
  language:
    input: text
    layers: 4
    layer: {hidden: 512, ffn: 2048, heads: 8, kv_groups: 8, gated: true, causal: true}
    stem: {kind: token_embedding, vocabulary: 1000}
    head: {kind: language_head, vocabulary: 1000}
    upstream: [vision, points]
"""

MIX = """
name: drives
iterations: 2
microbatches: 4
draw:
  kind: documents
  sources:
    - name: drives
      weight: 1
      mean_images: 2
      text_tokens: {mean: 200}
      others: {point_clouds: {share: 0.7, tokens: {mean: 40, sigma: 0.5}}, tactile: {share: 1, tokens: {mean: 9}}}
"""


@pytest.fixture
def model(tmp_path: Path):
    path = tmp_path / "lidar.yaml"
    path.write_text(MODEL)
    return load_model(path)


@pytest.fixture
def batches(tmp_path: Path, model) -> tuple[GlobalBatch, ...]:
    path = tmp_path / "drives.yaml"
    path.write_text(MIX)
    return load_workload(path, model, seed=3)


def test_batches_are_drawn_written_and_read(tmp_path: Path, model, batches):
    counts = [m.instances(model.module("points")) for b in batches for m in b.microbatches]
    assert sum(counts) > 0
    assert all(dict(m.others).keys() <= {"point_clouds"} for b in batches for m in b.microbatches)  # nobody feels
    assert all(sum(m.sequences) == m.tokens <= 2048 for b in batches for m in b.microbatches)
    path = tmp_path / "drives.jsonl"
    write_workload(path, batches)
    assert load_workload(path, model) == batches


def test_units_and_costs_follow_the_instances(model):
    microbatch = Microbatch(100, images=(64, 64), others={"point_clouds": (10, 20, 30)})
    units = make_units(model, [microbatch], {"points": 2})
    points = [u for u in units if u.module == "points"]
    assert [(u.first, u.count) for u in points] == [(0, 2), (2, 1)]
    (language,) = (u for u in units if u.module == "language")
    assert all(u.downstream == (language.id,) for u in points)
    shape = model.module("points")
    sizes = unit_sizes(shape, [microbatch], [(0, u.first, u.count) for u in points])
    assert sizes.tokens.tolist() == [60, 60]  # two of the module's own tokens become one
    assert sizes.outputs.tolist() == [30, 30]
    pricer = CostModel(model, load_cluster("h100"))
    assert (pricer.stem("points", sizes).weight > 0).all()
    assert shape.parameters == 96 * 128 + 2 * shape.layer.parameters + shape.head.parameters(128)
    assert microbatch.tokens == 100 + 128 + 60


def test_plans_are_made_written_and_read(tmp_path: Path, model, batches):
    cluster = load_cluster("h100")
    partition = choose_partition(model, cluster, batches, budget_seconds=np.inf, max_trials=3)
    plans = []
    for batch in batches:
        graph = priced_graph(CostModel(model, cluster), partition, batch.microbatches)
        found = search(graph, budget_seconds=60, evaluations=40, deterministic=True)
        plans.append(make_plan(graph, found.schedule, lower_bound=found.lower_bound))
        verify(plans[-1])
    assert {u.module for plan in plans for u in plan.graph.units} == {"vision", "points", "language"}
    write_plans(tmp_path / "plans.jsonl", plans)
    assert [p.digest() for p in read_plans(tmp_path / "plans.jsonl")] == [p.digest() for p in plans]


def test_what_no_module_reads_is_refused(model):
    with pytest.raises(WorkloadError, match=r"microbatches\[0\].tactile: no module of lidar reads tactile"):
        GlobalBatch((Microbatch(5, others={"tactile": (3,)}),)).check(model)
