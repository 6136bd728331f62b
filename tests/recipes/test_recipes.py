"""The provided recipes: their files agree, their flags are Megatron's, and plans on their partitions fit."""

from __future__ import annotations

import argparse
import shutil

import numpy as np
import pytest

from dip_megatron import recipes
from dip_megatron.config import DipConfig
from dip_megatron.core.lower import make_plan
from dip_megatron.core.verify import verify
from dip_megatron.describe.cost import cost_model, priced_graph
from dip_megatron.describe.files import ConfigurationError, shipped
from dip_megatron.describe.model import load_model
from dip_megatron.describe.partition import read_partition
from dip_megatron.describe.workload import load_workload
from dip_megatron.recipes import load_recipe, recipe_names
from dip_megatron.schedulers.dip.engine import search
from scripts import make_recipes

EXAMPLES = {"vision-audio-llm"}  # described for planning, without a recipe


def test_every_shipped_model_has_a_recipe():
    """But for those with experts: their replicas are planned together, which no recipe's files say."""
    dense = {name for name in shipped("models") if not any(m.layer.experts for m in load_model(name).modules)}
    assert set(recipe_names()) == dense - EXAMPLES


@pytest.mark.parametrize("name", recipe_names())
def test_its_files_are_found_by_its_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    assert DipConfig.load(name, {}) == recipe.config
    assert read_partition(name, recipe.model) == recipe.partition


def test_a_name_that_no_training_file_has_is_refused_with_those_there_are():
    with pytest.raises(ConfigurationError, match=r"vlm-xs: no such file, and not one of the shipped: .*t2v_tiny_cpu"):
        DipConfig.load("vlm-xs", {})


@pytest.mark.parametrize("name", recipe_names())
def test_a_plan_on_the_recipes_partition_fits(name):
    recipe = load_recipe(name)
    batch = load_workload(recipe.workload, recipe.model, 1, recipe.microbatches, 1)[0]
    graph = priced_graph(cost_model(recipe.model, recipe.cluster), recipe.partition, batch.microbatches)
    found = search(graph, budget_seconds=60.0, evaluations=2, deterministic=True)
    plan = make_plan(graph, found.schedule, lower_bound=found.lower_bound)
    verify(plan)
    assert np.all(np.array(plan.predicted.peak_bytes) <= recipe.cluster.usable_bytes)
    # The memory that the recipe names is that of its plans: never less than what the weights alone take.
    assert np.all(np.array(recipe.planned.memory_gb) * 1e9 >= graph.static_bytes * (1 - 0.15))
    assert max(recipe.planned.memory_gb) * 1e9 <= recipe.cluster.usable_bytes
    assert recipe.planned.iteration_seconds >= recipe.planned.lower_bound_seconds
    assert set(recipe.planned.without_dip) <= set(make_recipes.WITHOUT_DIP)
    assert all(recipe.planned.iteration_seconds < seconds for seconds in recipe.planned.without_dip.values())


@pytest.mark.parametrize("name", recipe_names())
def test_flags_are_megatrons(name):
    arguments = pytest.importorskip("megatron.training.arguments")
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    recipe = load_recipe(name)
    given, unknown = parser.parse_known_args([word for flag in recipe.flags for word in flag.split()])
    assert unknown == []
    parallel = recipe.model.parallel
    assert (given.tensor_model_parallel_size, given.pipeline_model_parallel_size) == (parallel.tp, parallel.pp)
    assert given.global_batch_size == recipe.microbatches * parallel.dp
    text = next(m for m in recipe.model.modules if m.input == "text")
    assert (given.num_layers, given.hidden_size, given.ffn_hidden_size) == (
        text.layers, text.layer.hidden, text.layer.ffn,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("recipe.yaml", "nodes: 2", "nodes: 3", "nodes: 3 of 8 GPUs, vlm-s is laid out for 16"),
        ("recipe.yaml", "planned:", "plans:", "plans"),
        ("dip.yaml", "schedule: dynamic", "schedule: static", "not what partition.yaml says"),
        ("megatron.args", "--num-layers 32", "--num-layers 31", "not the flags of vlm-s"),
    ],
)
def test_files_that_disagree_are_named(tmp_path, monkeypatch, file, old, new, message):
    shutil.copytree(recipes.FOLDER / "vlm-s", tmp_path / "vlm-s")
    path = tmp_path / "vlm-s" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_recipe("vlm-s")
    assert str(path) in str(caught.value)


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(ConfigurationError, match="vlm-s"):
        load_recipe("vlm-zz")


def test_the_page_lists_every_recipe_as_it_is():
    page = make_recipes.PAGE.read_text(encoding="utf-8")
    assert make_recipes.table() in page
