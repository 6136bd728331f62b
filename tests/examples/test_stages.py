"""LLaVA's two stages of training on the example: the projector alone, then projector and language model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from examples.llava_digits.runs import HERE
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.megatron.training import Log, run

pytestmark = [on_cpu_ranks, needs_megatron_training]


def flags_of(name: str) -> list[str]:
    return shlex.split((HERE / name).read_text())


def kinds(trace: Path) -> dict[tuple[str, str], set[int]]:
    """Ranks of the measured operations of the last iteration, by module and kind."""
    found: dict[tuple[str, str], set[int]] = {}
    for event in json.loads((trace / "trace.json").read_text())["traceEvents"]:
        if event["ph"] == "X" and event["tid"] == 1:
            module, kind = event["cat"].split(",")
            found.setdefault((module, kind), set()).add(event["pid"])
    return found


def test_stage_two_goes_on_from_stage_one(tmp_path: Path) -> None:
    logs: dict[str, list[Log]] = {"megatron": [], "dip": []}
    for name, runs in logs.items():
        saved, folder = str(tmp_path / name / "saved"), tmp_path / name
        for stage, flags in (
            ("one", ["--save", saved, "--save-interval", "1000"]),
            ("two", ["--load", saved]),
        ):
            trace = ["--dip-trace-dir", str(folder / stage / "trace")] if name == "dip" else []
            runs.append(run(folder / stage, *flags_of(f"stage-{stage}.args"), *flags, *trace, dip=name == "dip"))
    for megatrons, ours in zip(*logs.values(), strict=True):
        assert list(ours.losses) == [1, 2, 3]
        assert ours.losses == pytest.approx(megatrons.losses, rel=1e-5)
        assert ours.norms == pytest.approx(megatrons.norms, abs=2e-3)
    # Stage two begins with the data of stage one and with the projector that it trained.
    assert logs["dip"][1].losses[1] != pytest.approx(logs["dip"][0].losses[1], rel=1e-4)

    one, two = kinds(tmp_path / "dip" / "one" / "trace"), kinds(tmp_path / "dip" / "two" / "trace")
    assert one["language", "F"] == one["language", "B"] == {0, 1}
    assert not {("language", "W"), ("language", "BW")} & set(one)
    assert two["language", "F"] == {0, 1}
    assert {0, 1} == two.get(("language", "BW"), set()) | two.get(("language", "W"), set())
    for found in (one, two):
        assert found["vision", "F"] == {0, 1}
        # The projector follows the last layer, on the last rank; before it nothing trains and nothing goes back.
        assert [found.get(("vision", kind), set()) - {1} for kind in ("B", "W", "BW")] == [set()] * 3
