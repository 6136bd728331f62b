"""Model files of public recipes with experts have the parameters and the parallel sizes that were published."""

from __future__ import annotations

import pytest

from dip_megatron.describe.model import load_model

PUBLISHED = {
    # parameters of the published weights, GPUs of the recipe, replicas that share experts there
    "qwen3-vl-30b-a3b": (31.07e9, 8, 1),
    "qwen3-vl-235b-a22b": (235.7e9, 256, 1),
    "glm-4-5v": (107.7e9, 128, 16),
    "kimi-k2-5": (1.027e12, 512, 16),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_the_public_recipe(name: str) -> None:
    parameters, gpus, coupled = PUBLISHED[name]
    model = load_model(name)
    assert model.parameters == pytest.approx(parameters, rel=0.01)
    assert (model.parallel.gpus, model.parallel.coupled) == (gpus, coupled)
