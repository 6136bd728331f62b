"""ROLL's own training step on chunks that DIP builds: the same numbers on one rank without DIP and on two under it. A
GPT of the loop's own, and ``mcore_adapter``'s multimodal models, for which the environment alone asks for DIP."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from examples.llava_digits.runs import train
from tests.bridge.tiny_roll import ROLL_TINY
from tests.forked import forked

pytestmark = [
    pytest.mark.skipif(
        "DIP_ROLL_CHECKOUT" not in os.environ,
        reason="set DIP_ROLL_CHECKOUT to a working tree of ROLL, DIP_ROLL_PACKAGES to a folder with what it imports",
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the runs below are laid out for CPU ranks"),
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
    pytest.param("roll-qwen2-5-vl", "", "", 1, id="qwen2-5-vl"),
    pytest.param("roll-qwen3-vl", "", "", 1, id="qwen3-vl"),
    pytest.param("roll-qwen3-vl", "", "packed", 1, id="qwen3-vl packed"),
    pytest.param("roll-qwen3-vl-moe", "frozen", "packed", 1, id="qwen3-vl-moe frozen packed"),
    pytest.param("roll-qwen3-vl-moe", "", "packed", 2, id="qwen3-vl-moe of two replicas packed"),
]


@pytest.mark.parametrize(("name", "frozen", "packed", "replicas"), STEPS)
def test_its_own_models_train_as_without_dip(
    name: str, frozen: str, packed: str, replicas: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, norms, log probabilities, the first step's gradients, and the Hugging Face files saved at the end.
    Replicas spread experts over both, and have plans that agree."""
    tiny, folder = ROLL_TINY[name], tmp_path / name
    tiny.save(folder)
    monkeypatch.chdir(tmp_path)
    given = (str(folder), frozen, packed, str(replicas))
    alone = ran(tmp_path / "alone", replicas, *given)
    monkeypatch.setenv("DIP_SCHEDULE", "dynamic")
    monkeypatch.setenv("DIP_PLANNER_WORKERS", "0")
    monkeypatch.setenv("DIP_MODULES", CUT % (tiny.vision_layers - 2, tiny.language_layers - 3))
    under = ran(tmp_path / "dip", 2 * replicas, *given)

    assert {rank["chunks"] for rank in alone} == {1}
    assert {rank["chunks"] for rank in under} == {4}
    for expected, first, last in zip(alone, under[:replicas], under[replicas:], strict=True):
        assert_alike(first, last, expected)
        assert any(n.startswith("vision_model") for n in expected["gradients"]) != bool(frozen)
    if replicas > 1:
        return
    saved, weights = (read(tmp_path / run / "saved") for run in ("dip", "alone"))
    assert saved.keys() == weights.keys() == load_file(folder / "model.safetensors").keys()
    for n, weight in weights.items():  # Adam's steps make gradients near 0 larger than they are
        torch.testing.assert_close(saved[n], weight, rtol=0, atol=1e-4)


def assert_alike(first: dict[str, Any], last: dict[str, Any], expected: dict[str, Any]) -> None:
    """The ranks of a pipeline, and the one that trained without."""
    torch.testing.assert_close(last["log_probs"]["log_probs"], expected["log_probs"]["log_probs"], rtol=0, atol=1e-5)
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
