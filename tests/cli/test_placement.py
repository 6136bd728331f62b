"""``dip partition --place``: where encoders stand."""

from __future__ import annotations

from pathlib import Path

from dip_megatron.describe.model import load_model
from dip_megatron.describe.partition import read_partition
from tests.cli.test_verbs import call

SETTING = [
    "--model", "vlm-s", "--cluster", "h100", "--workload", "vlm-mix", "--iterations", "1", "--microbatches", "4",
    "--memory-gb", "400",
]  # fmt: skip


def test_an_encoder_may_be_placed_on_every_rank_and_planned_so(tmp_path: Path, capsys) -> None:
    path = tmp_path / "partition.yaml"
    assert call("partition", *SETTING, "--trials", "3", "--place", "vision=replicated", "-o", str(path)) == 0
    vision = read_partition(path, load_model("vlm-s")).module("vision")
    assert (vision.replicated, vision.layers) == (True, ((63,) * 4,))
    assert "vision: " in (said := capsys.readouterr().out)
    assert "all 63 layers on every rank" in said

    plans = tmp_path / "plans.jsonl"
    planned = ["plan", *SETTING, "--partition", str(path), "--budget", "0.2", "--out", str(plans)]
    assert call(*planned) == 0
    assert call("check", str(plans)) == 0


def test_what_cannot_be_placed_is_said_in_one_line(capsys) -> None:
    assert call("partition", *SETTING, "--place", "language=replicated") == 2
    assert "--place language=replicated: must be MODULE=HOW with one of vision and" in capsys.readouterr().err
