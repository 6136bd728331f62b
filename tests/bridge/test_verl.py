"""verl's own Megatron engine with Megatron-Bridge's Qwen2.5-VL: the same numbers on one rank without DIP and on two
under it. Microbatches come with each call, any number of them, each with any number of samples."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.llava_digits.runs import train
from tests.bridge.tiny import TINY
from tests.forked import forked
from tests.marks import on_cpu_ranks

CHECKOUT = os.environ.get("DIP_VERL_CHECKOUT")
pytestmark = [
    pytest.mark.skipif(
        CHECKOUT is None,
        reason="set DIP_VERL_CHECKOUT to a working tree of verl, DIP_VERL_PACKAGES to a folder with what it imports "
        "(docs/with-verl.md)",
    ),
    on_cpu_ranks,
    pytest.mark.slow,
]
DIP = {
    "DIP_SCHEDULE": "dynamic", "DIP_PLANNER_WORKERS": "0",
    "DIP_MODULES": "{vision: {layers: [[1, 1], [2, 0]], unit_size: 1}, language: {layers: [[1, 1], [1, 1]]}}",
}  # fmt: skip


def ran(name: str, folder: Path, out: Path, run: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """What each rank saved."""
    command = [sys.executable, "-m", "tests.bridge.verl_engine", str(folder), str(out), json.dumps({name: run})]
    train(name, command, out, lambda *_: None, ranks, forked)
    return [torch.load(out / f"{name}-{rank}.pt") for rank in range(ranks)]


def test_its_engine_trains_and_infers_as_without_dip(tmp_path: Path) -> None:
    """Losses of every microbatch, norms, the first step's gradients, log probabilities, exported weights."""
    TINY["qwen2-5-vl"].save(tmp_path / "qwen")
    (alone,) = ran("alone", tmp_path / "qwen", tmp_path, {}, ranks=1)
    first, last = ran("dip", tmp_path / "qwen", tmp_path, {"dip": DIP}, ranks=2)

    assert len({len(losses) for losses in alone["losses"]}) == 3  # microbatches an iteration
    assert (alone["chunks"], first["chunks"]) == (1, 4)
    for theirs, ours in zip(alone["losses"], last["losses"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert last["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    found = first["gradients"] | last["gradients"]
    assert found.keys() == alone["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        off_by = float((found[name] - gradient).abs().max())
        assert off_by <= 2e-5 * max(float(gradient.abs().max()), 1e-4), f"{name}: {off_by}"
    for theirs, ours in zip(alone["inferred"], last["inferred"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)
    assert first["weights"].keys() == alone["weights"].keys()
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-4)
