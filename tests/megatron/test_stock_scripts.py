"""Megatron-LM's own pretrain scripts, unedited, under ``dip run``. They are in no wheel: a checkout must be named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from examples.llava_digits.runs import Run
from tests.marks import on_cpu_ranks
from tests.upstream.runs import run_script

CHECKOUT = os.environ.get("DIP_MEGATRON_CHECKOUT")
pytestmark = [
    pytest.mark.skipif(CHECKOUT is None, reason="set DIP_MEGATRON_CHECKOUT to a Megatron-LM working tree"),
    on_cpu_ranks,
    pytest.mark.slow,
]


@pytest.fixture(scope="module", params=["pretrain_vlm.py", "pretrain_gpt.py"])
def script(request: pytest.FixtureRequest) -> Path:
    return Path(str(CHECKOUT)).resolve() / request.param


@pytest.fixture(scope="module")
def whole(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without dip_megatron, on one rank."""
    return run_script("absent", script, tmp_path_factory.mktemp("whole"), ranks=1)


def test_installed_but_off_changes_nothing(script: Path, whole: Run, tmp_path: Path) -> None:
    off = run_script("run", script, tmp_path, "--dip-schedule", "off", ranks=2)
    assert off.losses == run_script("absent", script, tmp_path, ranks=2, name="absent").losses
    assert off.losses == pytest.approx(whole.losses, rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_under_dip_are_those_of_the_whole_model(script: Path, whole: Run, tmp_path: Path, ranks: int) -> None:
    trace = tmp_path / "trace"
    run = run_script("run", script, tmp_path, "--dip-schedule", "dynamic", "--dip-trace-dir", str(trace), ranks=ranks)
    assert sorted(run.losses) == [1, 2, 3, 4]
    assert run.losses == pytest.approx(whole.losses, rel=1e-5)
    assert len((trace / "iterations.jsonl").read_text().splitlines()) == 4
