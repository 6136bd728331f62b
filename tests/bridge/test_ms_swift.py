"""ms-swift's own trainer with mcore-bridge's models on two CPU ranks: the same numbers without DIP and under it, which
the wheel's start-up file and the environment alone switch on; and InternVL and Qwen2-VL, which come through
mcore-bridge alone, as :mod:`.test_families` has the families of Megatron-Bridge."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from dip_megatron.core.strategies import strategy_names
from examples.llava_digits.runs import train
from tests.bridge.equality import together
from tests.bridge.test_families import assert_equal, partitions
from tests.bridge.tiny import TINY
from tests.bridge.tiny_mcore import MCORE_TINY
from tests.drawn import DEEP
from tests.marks import on_cpu_ranks

MISSING = [name for name in ("mcore_bridge", "swift", "modelscope") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs ms-swift and mcore-bridge: no {', '.join(MISSING)}"),
    on_cpu_ranks,
    pytest.mark.timeout(1800),  # the first test waits for all of the runs
]
LAYERS = "{vision: {layers: [[1, 1], [2, 0]], unit_size: 1}, language: {layers: [[1, 1], [1, 1]]}}"
ALL = {"tiny": "qwen2-5-vl", "freeze_vit": False, "freeze_aligner": False}
USUAL = {"tiny": "qwen2-5-vl", "micro_batch_size": 2, "eval_iters": 1, "eval_steps": 2}
"""Frozen encoders, as ms-swift has it unless it is told otherwise, and evaluations; two samples are packed in a row."""
DIP = {"DIP_SCHEDULE": "dynamic", "DIP_MODULES": LAYERS, "DIP_PLANNER_WORKERS": "0"}
TAPPED = {
    **DIP, "DIP_MODULES": "{vision: {layers: [[1, 1], [2, 1]], unit_size: 1}, language: {layers: [[1, 2], [2, 1]]}}",
}  # fmt: skip
"""Layers of the language model that deepstack feeds are on both ranks."""
PREDICTING = {**ALL, "tiny": "mcore-qwen3-5-mtp", "mtp_num_layers": 1, "micro_batch_size": 2}
ADAPTED = {"tuner_type": "lora", "lora_dropout": 0.0, "micro_batch_size": 2}
"""Adapters (LoRA) in every linear that isn't frozen: of the language model, unless ms-swift is told otherwise."""
BESIDE = {**ALL, **ADAPTED, "tuner_type": "lora_llm", "freeze_llm": True}
"""An encoder trained whole beside adapters in the language model."""
RUNS: dict[str, dict[str, Any]] = {
    "all": ALL,
    "all-dip": {**ALL, "dip": DIP},
    "usual": USUAL,
    "usual-dip": {**USUAL, "dip": DIP},
    "virtual-dip": {**ALL, "virtual_pipeline_model_parallel_size": 2, "dip": {"DIP_SCHEDULE": "static"}},
    "internvl": {**ALL, "tiny": "internvl"},
    "internvl-dip": {**ALL, "tiny": "internvl", "dip": DIP},
    "internvl-chat": {**ALL, "tiny": "internvl-chat"},
    "internvl-chat-dip": {**ALL, "tiny": "internvl-chat", "dip": DIP},
    "internvl-chat-frozen": {**USUAL, "tiny": "internvl-chat"},
    "internvl-chat-frozen-dip": {**USUAL, "tiny": "internvl-chat", "dip": DIP},
    "kimi-vl": {**ALL, "tiny": "kimi-vl"},
    "kimi-vl-dip": {**ALL, "tiny": "kimi-vl", "dip": DIP},
    "kimi-vl-frozen": {**USUAL, "tiny": "kimi-vl"},
    "kimi-vl-frozen-dip": {**USUAL, "tiny": "kimi-vl", "dip": DIP},
    "qwen2-vl": {**ALL, "tiny": "qwen2-vl"},
    "qwen2-vl-dip": {**ALL, "tiny": "qwen2-vl", "dip": DIP},
    "qwen3-vl": {**ALL, "tiny": "mcore-qwen3-vl"},
    "qwen3-vl-dip": {**ALL, "tiny": "mcore-qwen3-vl", "dip": TAPPED},
    "mergers": {**USUAL, "tiny": "mcore-qwen3-vl", "freeze_aligner": False},
    "mergers-dip": {**USUAL, "tiny": "mcore-qwen3-vl", "freeze_aligner": False, "dip": TAPPED},
    "frozen-qwen3-vl": {**USUAL, "tiny": "mcore-qwen3-vl"},
    "frozen-qwen3-vl-dip": {**USUAL, "tiny": "mcore-qwen3-vl", "dip": TAPPED},
    "qwen3-5": {**ALL, "tiny": "mcore-qwen3-5"},
    "qwen3-5-dip": {**ALL, "tiny": "mcore-qwen3-5", "dip": DIP},
    "frozen-qwen3-5": {**USUAL, "tiny": "mcore-qwen3-5"},
    "frozen-qwen3-5-dip": {**USUAL, "tiny": "mcore-qwen3-5", "dip": DIP},
    "predicting": PREDICTING,
    "predicting-dip": {**PREDICTING, "dip": DIP},
    "glm-4-1v": {**ALL, "tiny": "mcore-glm-4-1v"},
    "glm-4-1v-dip": {**ALL, "tiny": "mcore-glm-4-1v", "dip": DIP},
    "frozen": {**USUAL, "tiny": "internvl"},
    "frozen-dip": {**USUAL, "tiny": "internvl", "dip": DIP},
    "beside": BESIDE,
    "beside-dip": {**BESIDE, "dip": DIP},
}
ADAPTERS = {
    "adapters": ({**USUAL, **ADAPTED}, DIP),
    "experts": ({**ALL, **ADAPTED, "tiny": "mcore-qwen3-vl-moe"}, TAPPED),
}
if DEEP:
    OTHERS = ("internvl", "kimi-vl", "mcore-qwen3-vl", "mcore-glm-4-1v", "mcore-qwen3-5")
    ADAPTERS |= {
        f"{tiny}-adapters": ({**ALL, **ADAPTED, "tiny": tiny}, TAPPED if tiny == "mcore-qwen3-vl" else DIP)
        for tiny in OTHERS
    }
for name, (asked, dip) in ADAPTERS.items():  # two go on from adapters of the first, since each stage draws its own
    RUNS |= {name: asked, f"{name}-off": {**asked, "adapters": name}}
    RUNS[f"{name}-dip"] = {**asked, "adapters": name, "dip": dip}


def compared(name: str) -> dict[str, dict[str, Any]]:
    """An iteration of Megatron's own schedules and of DIP's plans, and logits."""
    case = {"tiny": name}
    one, several = (case | {"layers": partitions(MCORE_TINY[name])[cut]} for cut in ("one", "several"))
    under = {"unit_size": 2, "strategies": strategy_names()}
    return {
        f"{name}-whole": {"case": case, "function": "megatrons", "alone": True},
        f"{name}-stages": {"case": case, "function": "megatrons"},
        f"{name}-one": {"case": one, "function": "dips"},
        f"{name}-several": {"case": several | under, "function": "dips"},
        f"{name}-logits": {"case": several, "function": "dips", "more": [True]},
        f"{name}-hugging-face": {"case": case, "function": "hugging_face", "alone": True},
    }  # fmt: skip


ALL_RUNS = RUNS | {run: asked for name in MCORE_TINY for run, asked in compared(name).items()}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models and of all runs' results, made by that one of the test processes which needs them first: to
    each of several they would take as long again."""
    place = tmp_path_factory.getbasetemp()
    place = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "swift"
    done = place / "done"
    with FileLock(f"{place}.lock"):
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)
            for name, tiny in (MCORE_TINY | {"qwen2-5-vl": TINY["qwen2-5-vl"]}).items():
                tiny.save(place / "folders" / name)
            ran(ALL_RUNS, place / "folders", place)
            done.touch()
    return place


@pytest.fixture(scope="module")
def folders(trained: Path) -> Path:
    return trained / "folders"


@pytest.fixture(scope="module")
def runs(trained: Path) -> dict[str, list[Any]]:
    return results(ALL_RUNS, trained)


def ran(all_runs: dict[str, dict[str, Any]], folders: Path, out: Path, ranks: int = 2) -> dict[str, list[Any]]:
    """All of them by the same processes, which take longer to import ms-swift than to train."""
    command = [sys.executable, "-m", "tests.bridge.swift_training", str(folders), str(out), json.dumps(all_runs)]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DIP_SCHEDULE", "dynamic")  # for the start-up file; each run has variables of its own
        train("swift", command, out, lambda *_: None, ranks=ranks)
    return results(all_runs, out, ranks)


def results(all_runs: Iterable[str], out: Path, ranks: int = 2) -> dict[str, list[Any]]:
    """Of each run what every rank left in ``out``."""
    return {name: [torch.load(out / f"{name}-{rank}.pt") for rank in range(ranks)] for name in all_runs}


@pytest.mark.parametrize("cut", ["one", "several", "stages"])
@pytest.mark.parametrize("name", MCORE_TINY)
def test_segments_train_as_the_class_does(runs: Any, folders: Path, name: str, cut: str) -> None:
    """Losses and every gradient, also of Megatron's own two stages; weights in and out."""
    ranks = runs[f"{name}-{cut}"]
    assert_equal((ranks[-1][0], together([r[1] for r in ranks])), runs[f"{name}-whole"][0])
    saved = MCORE_TINY[name].exported(load_file(folders / name / "model.safetensors"))
    for exported in (r[2] for r in ranks if cut != "stages"):
        assert saved.keys() == exported.keys()
        for key, weight in saved.items():
            assert torch.equal(exported[key], weight), key


@pytest.mark.parametrize("name", MCORE_TINY)
def test_logits_are_those_of_hugging_face(runs: Any, name: str) -> None:
    for ours, theirs in zip(runs[f"{name}-logits"][-1], runs[f"{name}-hugging-face"][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=MCORE_TINY[name].tolerance)


@pytest.mark.parametrize(
    ("under", "off"),
    [
        ("all-dip", "all"), ("usual-dip", "usual"), ("virtual-dip", "all"), ("internvl-dip", "internvl"),
        ("qwen2-vl-dip", "qwen2-vl"), ("frozen-dip", "frozen"), ("internvl-chat-dip", "internvl-chat"),
        ("internvl-chat-frozen-dip", "internvl-chat-frozen"), ("qwen3-vl-dip", "qwen3-vl"),
        ("mergers-dip", "mergers"), ("frozen-qwen3-vl-dip", "frozen-qwen3-vl"),
        ("qwen3-5-dip", "qwen3-5"), ("predicting-dip", "predicting"), ("frozen-qwen3-5-dip", "frozen-qwen3-5"),
        ("glm-4-1v-dip", "glm-4-1v"),
        ("kimi-vl-dip", "kimi-vl"), ("kimi-vl-frozen-dip", "kimi-vl-frozen"),
        *((f"{name}-dip", f"{name}-off") for name in ADAPTERS),
    ],
)  # fmt: skip
def test_it_trains_as_without_dip(runs: Any, under: str, off: str) -> None:
    """Losses, the first iteration's gradients, norms, evaluations and exported weights."""
    given = RUNS[off]
    assert len(runs[under][-1]["evaluated"]) == (2 if "eval_iters" in given else 0)
    assert any("visual" in name for rank in runs[off] for name in rank["gradients"]) == ("freeze_aligner" in given)
    assert_trained_alike(runs[under], runs[off])


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_saved_by_themselves_and_merged(runs: Any, trained: Path, name: str) -> None:
    """Under the names that they have without DIP."""
    for folder, file in (("checkpoint-3", "adapter_model"), ("checkpoint-3-merged", "model")):
        ours, theirs = (load_file(trained / f"{name}-{how}" / folder / f"{file}.safetensors") for how in ("dip", "off"))
        assert ours.keys() == theirs.keys()
        for key, weight in theirs.items():
            torch.testing.assert_close(ours[key], weight, rtol=0, atol=3e-5)


def test_an_encoder_trains_whole_beside_adapters(runs: Any) -> None:
    """What adapters give is 0 in the first iteration, whatever each stage has drawn."""
    assert runs["beside-dip"][-1]["losses"][0] == pytest.approx(runs["beside"][-1]["losses"][0], abs=3e-6)
    ours, theirs = (together([r["gradients"] for r in runs[name]]) for name in ("beside-dip", "beside"))
    assert ours.keys() == theirs.keys()
    encoder = [name for name in theirs if "visual" in name]
    assert encoder
    assert len(encoder) < len(theirs)
    for name in encoder:
        off_by = float((ours[name] - theirs[name]).abs().max())
        assert off_by <= 2e-5 * max(float(theirs[name].abs().max()), 1e-4), f"{name}: {off_by}"


def assert_trained_alike(found: list[Any], expected: list[Any], weights: float = 3e-5) -> None:
    """Of one replica's ranks; weights are as close as that. Experts have the numbers that they have on a rank."""
    assert len(found[-1]["losses"]) == 3
    for name in ("losses", "evaluated"):
        torch.testing.assert_close(found[-1][name], expected[-1][name], rtol=0, atol=3e-6)
    torch.testing.assert_close(found[-1]["norms"], expected[-1]["norms"], rtol=2e-5, atol=0)
    ours, theirs = (rank[0]["gradients"] | rank[1]["gradients"] for rank in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        off_by = float((ours[name] - gradient).abs().max())
        assert off_by <= 2e-5 * max(float(gradient.abs().max()), 1e-4), f"{name}: {off_by}"
    assert found[0]["weights"].keys() == expected[0]["weights"].keys()
    for name, weight in expected[0]["weights"].items():
        # Of Adam's three steps of 1e-3 each, which gradients near 0 make larger than they are.
        torch.testing.assert_close(found[0]["weights"][name], weight, rtol=0, atol=weights)


def test_what_it_saves_is_read_again_bit_for_bit(runs: Any, folders: Path, tmp_path: Path) -> None:
    import transformers

    folder = folders / "qwen2-5-vl"
    (run, _), start = runs["all-dip"], load_file(folder / "model.safetensors")
    shutil.copy(Path(run["saved"]) / "model.safetensors", tmp_path)
    for name in ("config.json", "generation_config.json"):  # which ms-swift saves with the processor
        shutil.copy(folder / name, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == run["weights"].keys() == start.keys()
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    read = {  # by the names of files
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): weight
        for name, weight in model.state_dict().items()
    }
    assert [name for name in start if torch.equal(read[name], start[name])] == []
    for name, weight in saved.items():
        assert torch.equal(read[name], weight), name
        assert torch.equal(run["weights"][name], weight), name
