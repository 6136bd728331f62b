"""ROLL's own training step on chunks that DIP builds: the same numbers on one rank without DIP and on two under it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.llava_digits.runs import train
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


def ran(out: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank saved."""
    out.mkdir()
    train("roll", [sys.executable, "-m", "tests.bridge.roll_step", str(out)], out, lambda *_: None, ranks, forked)
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
