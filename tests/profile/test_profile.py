"""What `dip profile` measures ends up in plans."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core.strategies import known_strategies, parse_strategy
from dip_megatron.describe.cost import Costs, build_graph, load_cluster
from dip_megatron.describe.model import even_partition, load_model
from dip_megatron.describe.workload import Microbatch
from dip_megatron.profile import timing
from dip_megatron.profile.operators import attention_lengths, curve_of, matmul_shapes
from dip_megatron.profile.timing import measure
from tests.forked import done
from tests.patience import LONG

TINY = """
name: tiny
parallel: {tp: 1, pp: 2, dp: 1}
packing: {max_tokens: 128, max_images: 12, image_tokens: 9}
modules:
  vision:
    input: images
    layers: 6
    layer: {hidden: 64, ffn: 256, heads: 4, kv_groups: 4}
    stem: {kind: patch_embedding, patch: 4}
    head: {kind: projector, reduction: 4, inner: 96, output: 96}
  language:
    input: text
    layers: 6
    layer: {hidden: 96, ffn: 256, heads: 4, kv_groups: 4, gated: true, causal: true}
    stem: {kind: token_embedding, vocabulary: 512}
    head: {kind: language_head, vocabulary: 512}
    upstream: [vision]
"""


@given(st.lists(st.tuples(st.floats(1, 1e15), st.floats(1e-9, 50)), min_size=1, max_size=40))
def test_curves_rise_in_size_and_are_efficiencies(points):
    curve = curve_of(points)
    sizes = [size for size, _ in curve]
    assert sizes == sorted(set(sizes))
    assert min(s for s, _ in points) * 0.999 <= sizes[0]
    assert sizes[-1] <= max(s for s, _ in points) * 1.001
    assert all(0 < efficiency <= 1.2 for _, efficiency in curve)


def test_shapes_are_those_of_one_rank():
    vision = load_model("vlm-s").module("vision")
    assert matmul_shapes(vision, 4, [100]) == {
        (100, 1792, 3 * 1792 // 4), (100, 1792 // 4, 1792), (100, 1792, 15360 // 4), (100, 15360 // 4, 1792),
    }  # fmt: skip
    assert attention_lengths(vision, load_model("vlm-s"), [1, 10**6]) == [2704]


def test_each_step_is_timed_apart(monkeypatch):
    """The median of what each took, by a clock that goes on when they run."""
    now, calls = 0.0, 0

    def step():
        nonlocal now, calls
        calls += 1
        now += 100.0 if calls == 4 else 1.0  # a hiccup

    def work():
        nonlocal now
        now += 20.0

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    assert measure([step, work], torch.device("cpu"), repeats=3) == [1.0, 20.0]
    assert calls == 5


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    """One profile of a tiny model's layers, through the command."""
    folder = tmp_path_factory.mktemp("profile")
    (folder / "tiny.yaml").write_text(TINY)
    command = ["-m", "dip_megatron.cli", "profile", "--model", "tiny.yaml", "--layers", "--repeats", "1", "--json"]
    ended = done(command, folder)
    assert ended.status == 0, ended.err[-2000:]
    return json.loads(ended.out), folder / "tiny-costs.json", folder / "tiny.yaml"


def test_every_part_is_measured(costs):
    summary, path, _ = costs
    loaded = Costs.load(path)
    assert {(t.module, t.part, t.quantity) for t in loaded.tables} >= {
        (module, part, quantity)
        for module in ("vision", "language")
        for part in ("stem", "layer", "head")
        for quantity in ("forward", "backward", "weight")
    }
    assert {(t.module, t.strategy, t.quantity) for t in loaded.tables if t.strategy != "none"} >= {
        (module, strategy, quantity)
        for module in ("vision", "language")
        for strategy in (s.name for s in known_strategies()[1:] if not s.instead_of)
        for quantity in ("forward", "backward")
    }
    assert summary["tables"] == len(loaded.tables)
    assert {name for name, _ in loaded.efficiency} == {"attention", "attention_backward", "matmul", "memory"}
    assert all(max(t.values) > 0 for t in loaded.tables)


def test_plans_use_what_was_measured(costs):
    _, path, model_file = costs
    model, loaded = load_model(model_file), Costs.load(path)
    batch = [Microbatch(128 - 4 * 9, (9,) * 4)]
    cluster = load_cluster("cpu")
    graph = build_graph(model, cluster, even_partition(model), batch, costs=loaded)
    table = {(t.part, t.quantity, t.strategy): t for t in loaded.tables if t.module == "vision"}
    priced_as = {s.name: s.instead_of or s.name for s in known_strategies()}
    tokens = torch.tensor([144.0]).numpy()

    for c, text in enumerate(graph.strategies[0][0]):
        for quantity in ("forward", "backward"):
            layers = sum(table["layer", quantity, priced_as[name]].at(tokens)[0] for name in parse_strategy(text, 3))
            expected = table["stem", quantity, "none"].at(tokens)[0] + layers + cluster.between_operations
            assert getattr(graph, quantity)[c, 0, 0] == pytest.approx(expected), text


def test_a_model_that_is_not_there_is_named_in_one_line(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "dip_megatron.cli", "profile", "--model", "nothing-there"],
        cwd=tmp_path, capture_output=True, text=True, timeout=LONG, env=os.environ | {"PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert ended.returncode == 2
    assert len(ended.stderr.strip().splitlines()) == 1
