"""ROLL's own multimodal models (``mcore_adapter``): DIP's losses and gradients are those of the class under Megatron's
own schedules, its logits those of Hugging Face's model, and weights go in and out bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dip_megatron.core.strategies import strategy_names
from tests.bridge import equality, test_families
from tests.bridge.equality import Case, together
from tests.bridge.tiny_model import Tiny
from tests.bridge.tiny_roll import ROLL_TINY
from tests.marks import on_cpu_ranks
from tests.processes import Team

pytestmark = [
    pytest.mark.skipif("DIP_ROLL_CHECKOUT" not in os.environ, reason="set DIP_ROLL_CHECKOUT to a working tree of ROLL"),
    on_cpu_ranks,
    pytest.mark.slow,
]
assert_equal = partial(test_families.assert_equal, output="output_layer.weight")
"""A tied head has a copy of its own where the pipeline ends."""


@pytest.fixture(scope="module")
def teams() -> Iterator[dict[str, Team]]:
    """Of their own: ROLL's classes change Megatron."""
    made = {"alone": Team(1), "stages": Team(2), "shards": Team(2), "both": Team(4)}
    yield made
    for one in made.values():
        one.close()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def case(name: str) -> Case:
        folder: Path = tmp_path_factory.mktemp(name)
        ROLL_TINY[name].save(folder)
        return Case(name, folder, {}, seed=3)

    return case


@pytest.fixture(scope="module")
def alone(cases: Any, teams: dict[str, Team]) -> Any:
    @cache
    def found(name: str, packed: bool = False) -> Any:
        return teams["alone"].run(equality.megatrons, replace(cases(name), packed=packed))[0]

    return found


def partitions(tiny: Tiny) -> dict[str, dict[str, Any]]:
    """One segment, and several with chunks of no layers among them."""
    rest, half = tiny.vision_layers - 2, tiny.language_layers // 2
    return {
        "one": {"vision": ((1, tiny.vision_layers - 1),), "language": ((half, half),)},
        "several": {"vision": ((0, 2), (rest, 0)), "language": ((0, 1), (1, tiny.language_layers - 2))},
    }


@pytest.mark.parametrize("name", ROLL_TINY)
@pytest.mark.parametrize("cut", ["one", "several"])
def test_segments_train_as_the_class_does(name: str, cut: str, cases: Any, alone: Any, teams: dict[str, Team]) -> None:
    """In several segments also under every memory strategy."""
    unit, strategies = (2, strategy_names()) if cut == "several" else (1, ("none",))
    case = replace(
        cases(name), layers=partitions(ROLL_TINY[name])[cut], unit_size=unit, strategies=strategies
    )  # fmt: skip
    ranks = teams["stages"].run(equality.dips, case)
    assert_equal((ranks[-1][0], together([r[1] for r in ranks])), alone(name))
    saved = load_file(case.folder / "model.safetensors")
    for exported in (r[2] for r in ranks):
        assert saved.keys() == exported.keys()
        for key, weight in saved.items():
            assert torch.equal(exported[key], weight), key


@pytest.mark.parametrize("name", [name for name, tiny in ROLL_TINY.items() if not tiny.tied])
def test_logits_are_those_of_hugging_face(name: str, cases: Any, teams: dict[str, Team]) -> None:
    case = cases(name)
    ranks = teams["stages"].run(equality.dips, replace(case, layers=partitions(ROLL_TINY[name])["several"]), True)
    (theirs,) = teams["alone"].run(equality.hugging_face, case)
    for ours, expected in zip(ranks[-1], theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=ROLL_TINY[name].tolerance)


SHARDS = [
    pytest.param("roll-qwen2-5-vl", True, False, id="qwen2-5-vl in sequence"),
    pytest.param("roll-qwen2-5-vl", False, False, id="qwen2-5-vl"),
    pytest.param("roll-qwen3-vl", True, False, id="qwen3-vl in sequence"),
    pytest.param("roll-qwen3-vl", True, True, id="qwen3-vl packed in sequence"),
]


@pytest.mark.parametrize(("name", "sequence", "packed"), SHARDS)
def test_shards_train_as_the_class_does(
    name: str, sequence: bool, packed: bool, cases: Any, alone: Any, teams: dict[str, Team]
) -> None:
    """Two tensor-parallel ranks a stage, which share the pictures out. The language model's gradients are those of the
    class on two such ranks; the encoder's those of the class on one: on two, its own way to share pictures out loses a
    part of them."""
    case = replace(cases(name), tensor=2, sequence=sequence, packed=packed)
    shards = teams["shards"].run(equality.megatrons, case)
    ranks = teams["both"].run(equality.dips, replace(case, layers=partitions(ROLL_TINY[name])["several"]))
    encoder = {n: gradient for n, gradient in alone(name, packed)[1].items() if n.startswith("vision_model.")}
    for shard, (losses, gradients) in enumerate(shards):
        found = together([ranks[stage + shard][1] for stage in (0, 2)])
        assert_equal((ranks[2 + shard][0], found), (losses, gradients | encoder))


def test_samples_that_the_class_packs_train_as_without_dip(cases: Any, alone: Any, teams: dict[str, Team]) -> None:
    name = "roll-qwen3-vl"
    case = replace(cases(name), layers=partitions(ROLL_TINY[name])["several"], packed=True)
    ranks = teams["stages"].run(equality.dips, case)
    assert_equal((ranks[-1][0], together([r[1] for r in ranks])), alone(name, True))
