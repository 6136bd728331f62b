"""A tiny Qwen2.5-VL trained by Megatron-Bridge's own loop on CPU ranks, without DIP and under it: the same numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.bridge.equality import Case, provider_of
from tests.bridge.loop import Run, configuration, save_text_model, trained
from tests.bridge.tiny import TINY
from tests.megatron.exchange_case import slow_cluster
from tests.processes import Team, team


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("qwen")
    TINY["qwen2-5-vl"].save(made)
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return run(folder, Run())[0]


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one rank without DIP, after two of four iterations."""
    made = tmp_path_factory.mktemp("saved")
    run(folder, Run(save=made, iterations=2))
    return made


def run(folder: Path, how: Run) -> list[dict[str, Any]]:
    """What each rank of a training of its own processes returns: Bridge initialises a process once."""
    ranks = Team(how.pipeline * how.replicas)
    try:
        return ranks.run(trained, folder, how)
    finally:
        ranks.close()


def assert_same(
    found: list[dict[str, Any]], expected: dict[str, Any], loss: float = 2e-6, weight: float = 1e-5
) -> None:
    """The ranks' losses, gradients' norms and exported weights are those of one."""
    first, *_, last = found
    assert last["losses"]
    assert last["operations"] == expected["operations"] > 0
    for name in ("losses", "evaluated"):
        torch.testing.assert_close(last[name], expected[name], rtol=0, atol=loss)
    torch.testing.assert_close(last["norms"], expected["norms"], rtol=10 * loss, atol=0)
    assert first["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=0, atol=weight)


@pytest.mark.parametrize("virtual", [None, 2])
def test_stages_train_as_one_rank(folder: Path, alone: dict[str, Any], virtual: int | None) -> None:
    assert_same(run(folder, Run(pipeline=2, virtual=virtual)), alone)


def test_training_moves_all_weights_of_the_folder(folder: Path, alone: dict[str, Any]) -> None:
    start = load_file(folder / "model.safetensors")

    assert alone["weights"].keys() == start.keys()
    assert [name for name in start if torch.equal(start[name], alone["weights"][name])] == []


LAYERS = {"vision": {"layers": [[1, 1], [2, 0]]}, "language": {"layers": [[1, 1], [1, 1]]}}
GIVEN = {"schedule": "dynamic", "modules": LAYERS}
REPLICATED = {
    "schedule": "dynamic",
    "modules": {"vision": {"placement": "replicated", "unit_size": 1}, "language": {"layers": [[1, 1], [1, 1]]}},
}


def test_dip_trains_as_one_rank(folder: Path, alone: dict[str, Any]) -> None:
    """The encoder in segments over all ranks, one image or video a unit."""
    by_one = {**GIVEN, "modules": {**LAYERS, "vision": {**LAYERS["vision"], "unit_size": 1}}}
    assert_same(run(folder, Run(pipeline=2, dip=by_one)), alone)


def test_an_encoder_that_stands_on_both_ranks_trains_as_on_one(folder: Path, alone: dict[str, Any]) -> None:
    """One image or video a unit, encoded by one rank or the other; copies that stepped apart would show."""
    assert_same(run(folder, Run(pipeline=2, dip=REPLICATED)), alone)


def exchanges(trace: Path) -> list[dict[str, Any] | None]:
    return [json.loads(line)["exchange"] for line in (trace / "iterations.jsonl").read_text().splitlines()]


def test_replicas_that_exchange_train_as_one_rank(folder: Path, tmp_path: Path) -> None:
    """Two replicas of two stages, whose reductions and gathers overlap, from a Hugging Face folder, with an evaluation;
    ended after two of four iterations, while the third's microbatches are exchanged, and resumed, with a loader that
    goes on at the sample after the last one trained on, under the checkpoint's partition."""
    how = Run(finetunes=True, evaluates=True, iterations=4, keeps_place=True)
    (expected,) = run(folder, how)
    slow = tmp_path / "slow.yaml"  # no host is too busy for an exchange
    slow.write_text(slow_cluster())
    dip = {**GIVEN, "balance": "swap", "cluster": str(slow), "recalibrate": False, "trace_dir": str(tmp_path / "trace")}
    under = replace(how, pipeline=2, replicas=2, sharded=True, dip=dip, save=tmp_path / "saved")
    first = run(folder, replace(under, ends=2))
    del dip["modules"]  # the checkpoint's
    second = run(folder, replace(under, load=tmp_path / "saved"))
    for name in ("losses", "norms", "evaluated"):
        second[-1][name] = first[-1][name] + second[-1][name]
    second[-1]["operations"] = expected["operations"]  # Bridge takes one replica's pictures for all replicas'
    assert_same(second, expected)
    moved = [found["moved"] if found else None for found in exchanges(tmp_path / "trace")]
    assert len(moved) == 4
    assert (moved[0], moved[2]) == (None, None)  # what a run reads first stays where it is
    assert any(moved)


def read_again(rank: int, world: int, folder: Path) -> dict[str, torch.Tensor]:
    """Weights that Hugging Face's model has of a folder, and Bridge's own model exports again."""
    import transformers

    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    read = {  # by the names of files
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): weight
        for name, weight in theirs.state_dict().items()
    }
    saved = load_file(folder / "model.safetensors")
    assert read.keys() == saved.keys()
    assert all(torch.equal(weight, saved[name]) for name, weight in read.items())
    bridge, provider = provider_of(Case("qwen2-5-vl", folder, {}), world)
    model = provider.provide(pre_process=True, post_process=True)
    bridge.load_hf_weights([model])
    return dict(bridge.export_hf_weights([model], cpu=True, show_progress=False))


def test_what_dip_trained_is_saved_and_read_again_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    trained = run(folder, Run(pipeline=2, iterations=2, dip=GIVEN, export=tmp_path))[0]["weights"]
    start, saved = (load_file(made / "model.safetensors") for made in (folder, tmp_path))
    assert saved.keys() == trained.keys() == start.keys()
    assert [name for name in saved if torch.equal(saved[name], start[name])] == []
    again = team(1).run(read_again, tmp_path)[0]
    for name, weight in trained.items():
        assert torch.equal(saved[name], weight), name
        assert torch.equal(again[name], weight), name


def test_dips_own_partition_replaces_virtual_stages(folder: Path, alone: dict[str, Any]) -> None:
    assert_same(run(folder, Run(pipeline=2, virtual=2, dip={"schedule": "static"})), alone)


@pytest.mark.parametrize("how", [
    Run(frozen=("vision_model",), evaluates=True),
    Run(frozen=("vision_model", "vision_projection"), micro_batch_size=2),
    Run(frozen=("language_model",), finetunes=True),
], ids=["vision", "encoder", "language"])  # fmt: skip
def test_dip_keeps_frozen_what_is(folder: Path, how: Run) -> None:
    assert_same(run(folder, replace(how, pipeline=2, dip=GIVEN)), run(folder, how)[0])


@pytest.mark.parametrize("dip", [GIVEN, REPLICATED], ids=["segmented", "replicated"])
def test_dip_goes_on_from_a_checkpoint_without_it_and_the_other_way(
    folder: Path, saved: Path, tmp_path: Path, dip: dict[str, Any]
) -> None:
    onwards = run(folder, Run(load=saved, iterations=4))[0]
    assert len(onwards["losses"]) == 2
    under = Run(load=saved, pipeline=2, iterations=4, dip=dip)
    assert_same(run(folder, under), onwards)

    run(folder, Run(save=tmp_path, pipeline=2, iterations=2, dip=dip))
    assert_same([run(folder, Run(load=tmp_path, iterations=4))[0]] * 2, onwards)


def language_in(rank: int, world: int, folder: Path, how: Run, iterations: tuple[int, ...]) -> dict[str, Any]:
    """By the checkpoint that a run from these iterations would load: layers of the language model in its chunks."""
    from dip_megatron.megatron.adapters.bridge_checkpoints import find_bridge_checkpoint

    found = {}
    for iteration in iterations:
        checkpoint = find_bridge_checkpoint(configuration(folder, replace(how, from_iteration=iteration)))
        assert checkpoint is not None
        part = checkpoint.partition and checkpoint.partition.module("language")
        found[Path(checkpoint.path).name] = part and part.layers
    return found


def test_each_checkpoint_of_a_folder_says_under_which_chunks_it_was_written(folder: Path, tmp_path: Path) -> None:
    """Runs that go on from one another and save to one folder, the last one without DIP: who goes back to an older
    iteration has the partition of that one."""
    run(folder, Run(save=tmp_path, pipeline=2, iterations=2, dip=GIVEN))
    other = {**LAYERS, "language": {"layers": [[1, 2], [1, 0]]}}
    onwards = Run(save=tmp_path, load=tmp_path, pipeline=2, iterations=4)
    run(folder, replace(onwards, dip={**GIVEN, "modules": other}))
    run(folder, replace(onwards, iterations=6))
    (found,) = team(1).run(language_in, folder, onwards, (2, 4, 6))
    assert found == {"iter_0000002": ((1, 1), (1, 1)), "iter_0000004": ((1, 2), (1, 0)), "iter_0000006": None}


def test_dip_trains_a_text_model_in_the_virtual_stages_it_asks_for(tmp_path: Path) -> None:
    save_text_model(tmp_path)
    expected = run(tmp_path, Run(text=True))[0]
    assert_same(run(tmp_path, Run(text=True, pipeline=2, virtual=2, dip={"schedule": "dynamic"})), expected)
