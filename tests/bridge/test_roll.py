"""ROLL's own training step on chunks that DIP builds: the same numbers on one rank without DIP and on two under it. A
GPT of the loop's own, and ``mcore_adapter``'s multimodal models, for which the environment alone asks for DIP."""

from __future__ import annotations

import os
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from examples.llava_digits.runs import train
from tests.bridge.tiny_roll import ROLL_TINY
from tests.forked import forked
from tests.marks import on_cpu_ranks

pytestmark = [
    pytest.mark.skipif(
        "DIP_ROLL_CHECKOUT" not in os.environ,
        reason="set DIP_ROLL_CHECKOUT to a working tree of ROLL, DIP_ROLL_PACKAGES to a folder with what it imports",
    ),
    on_cpu_ranks,
    pytest.mark.slow,
]
DIP = {
    "DIP_SCHEDULE": "dynamic", "DIP_PLANNER_WORKERS": "0", "DIP_MODULES": "{language: {layers: [[1, 1], [1, 1]]}}"
}  # fmt: skip


def ran(out: Path, ranks: int, *given: str) -> list[dict[str, Any]]:
    """What each rank saved."""
    out.mkdir()
    command = [sys.executable, "-m", "tests.bridge.roll_step", str(out), *given]
    train("roll", command, out, lambda *_: None, ranks, forked)
    return [torch.load(out / f"{rank}.pt") for rank in range(ranks)]


def test_its_step_trains_as_without_dip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of every microbatch, packed as ROLL packs them, norms, and the first step's gradients."""
    monkeypatch.chdir(tmp_path)  # where ROLL leaves its logs
    (alone,) = ran(tmp_path / "alone", 1)
    for name, value in DIP.items():
        monkeypatch.setenv(name, value)
    first, last = ran(tmp_path / "dip", 2)

    assert (alone["chunks"], first["chunks"]) == (1, 2)
    assert len({len(step["actor/loss@sum"]) for step in alone["metrics"]}) == 2  # microbatches a step
    for theirs, ours in zip(alone["metrics"], last["metrics"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=0)
    found = first["gradients"] | last["gradients"]
    assert found.keys() == alone["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * float(gradient.abs().max()))


CUT = "{vision: {layers: [[1, 0], [1, %d]], unit_size: 1}, language: {layers: [[1, 1], [1, %d]]}}"
STEPS = [
    pytest.param("roll-qwen2-5-vl", "", "", (1, 1), id="qwen2-5-vl"),
    pytest.param("roll-qwen3-vl", "", "", (1, 1), id="qwen3-vl"),
    pytest.param("roll-qwen3-vl", "", "packed", (1, 1), id="qwen3-vl packed"),
    pytest.param("roll-qwen3-vl-moe", "frozen", "packed", (1, 1), id="qwen3-vl-moe frozen packed"),
    pytest.param("roll-qwen3-vl-moe", "", "packed", (2, 1), id="qwen3-vl-moe of two replicas packed"),
    pytest.param("roll-qwen3-vl", "frozen", "packed", (1, 2), id="qwen3-vl frozen packed on two tensor ranks"),
    pytest.param("roll-qwen2-5-vl", "frozen", "", (1, 2), id="qwen2-5-vl frozen on two tensor ranks"),
]


@pytest.mark.parametrize(("name", "frozen", "packed", "stage"), STEPS)
def test_its_own_models_train_as_without_dip(
    name: str, frozen: str, packed: str, stage: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, norms, log probabilities, the first step's gradients, and the Hugging Face files saved at the end.
    ``stage`` is of replicas, which spread experts over both and have plans that agree, and of tensor-parallel ranks."""
    tiny, folder = ROLL_TINY[name], tmp_path / name
    tiny.save(folder)
    monkeypatch.chdir(tmp_path)
    given, ranks = (str(folder), frozen, packed, *map(str, stage)), prod(stage)
    alone = ran(tmp_path / "alone", ranks, *given)
    monkeypatch.setenv("DIP_SCHEDULE", "dynamic")
    monkeypatch.setenv("DIP_PLANNER_WORKERS", "0")
    monkeypatch.setenv("DIP_MODULES", CUT % (tiny.vision_layers - 2, tiny.language_layers - 3))
    under = ran(tmp_path / "dip", 2 * ranks, *given)

    assert {rank["chunks"] for rank in alone} == {1}
    assert {rank["chunks"] for rank in under} == {4}
    assert alone[0]["log_probs"]["log_probs"].any()
    for expected, first, last in zip(alone, under[:ranks], under[ranks:], strict=True):
        assert_alike(first, last, expected)
        assert any(n.startswith("vision_model") for n in expected["gradients"]) != bool(frozen)
    if stage[0] > 1:
        return
    saved, weights = (read(tmp_path / run / "saved") for run in ("dip", "alone"))
    assert saved.keys() == weights.keys() == load_file(folder / "model.safetensors").keys()
    for n, weight in weights.items():  # Adam's steps make gradients near 0 larger than they are
        torch.testing.assert_close(saved[n], weight, rtol=0, atol=1e-4)


def assert_alike(first: dict[str, Any], last: dict[str, Any], expected: dict[str, Any]) -> None:
    """The ranks of a pipeline, and the one that trained without."""
    asked, known = ({} if rank["log_probs"] is None else rank["log_probs"] for rank in (last, expected))
    assert asked.keys() == known.keys()  # on the first of tensor-parallel ranks
    for n, values in known.items():
        torch.testing.assert_close(asked[n], values, rtol=0, atol=1e-5)
    for theirs, ours in zip(expected["metrics"], last["metrics"], strict=True):
        assert ours.keys() == theirs.keys()
        for metric, value in theirs.items():
            torch.testing.assert_close(ours[metric], value, rtol=3e-5, atol=3e-6)
    found = first["gradients"] | last["gradients"]
    assert found.keys() == expected["gradients"].keys()
    for n, gradient in expected["gradients"].items():
        off = float((found[n] - gradient).abs().max())
        assert off <= 2e-5 * max(float(gradient.abs().max()), 1e-4), f"{n}: {off} of {gradient.abs().max()}"


def read(folder: Path) -> dict[str, torch.Tensor]:
    """What all safetensors there hold."""
    return {name: weight for file in sorted(folder.glob("*.safetensors")) for name, weight in load_file(file).items()}
