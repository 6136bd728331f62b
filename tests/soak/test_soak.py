"""The soak finds what it is there to find; and a short one passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.forked import forked
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.soak.checks import faults, read_log
from tests.soak.replicas import BATCH, samples_of, wrong

LINE = (
    " [2026-01-01 00:00:00.000000] iteration {i:8d}/     400 | consumed samples: 96 | elapsed time per iteration (ms): "
    "30.0 | learning rate: 1.0E-05 | global batch size:     4 | lm loss: {loss:.6E} | digit accuracy: 1.2E-01 | "
    "loss scale: 1.0 | grad norm: {norm:.3f} | number of skipped iterations:   0 |"
)
ITERATIONS = 400


def log(**changed: float) -> dict[int, tuple[float, float]]:
    """A run's log, ``loss_7=...`` and ``norm_7=...`` being what iteration 7 reports."""
    lines = [
        LINE.format(i=i, loss=changed.get(f"loss_{i}", 3.0), norm=changed.get(f"norm_{i}", 1.5))
        for i in range(1, ITERATIONS + 1)
    ]
    return read_log("\n".join(lines))


def diary(**more: Any) -> list[dict[str, Any]]:
    """Flat memory; ``more`` are functions of the iteration."""
    flat = {"trainer_bytes": 8e8, "planner_bytes": 2e8, "stall_seconds": 0.001}
    return [flat | {name: value(i) for name, value in more.items()} for i in range(ITERATIONS)]


def test_a_good_run_has_no_faults() -> None:
    assert log()[7] == (3.0, 1.5)
    assert faults(log(), log(), [diary(), diary()], ITERATIONS) == []


@pytest.mark.parametrize(
    ("disturbed", "second_diary", "message"),
    [
        ({"loss_7": 3.001}, {}, "iteration 7: loss 3.001"),
        ({"loss_7": float("nan")}, {}, "reports no iteration 7"),
        ({"norm_9": 1.51}, {}, "iteration 9: gradient norm 1.51"),
        ({}, {"trainer_bytes": lambda i: 8e8 + 1e5 * i}, "rank 1: the trainer grew"),
        ({}, {"planner_bytes": lambda i: 2e8 + 1e5 * i}, "rank 1: the planner grew"),
        ({}, {"stall_seconds": lambda i: 1e-3 * i}, "rank 1: training waited"),
    ],
)
def test_what_must_not_be_is_found(disturbed: dict, second_diary: dict, message: str) -> None:
    found = faults(log(**disturbed), log(), [diary(), diary(**second_diary)], ITERATIONS)
    assert len(found) == 1
    assert message in found[0]


def test_planners_that_start_again_are_no_growth() -> None:
    restarts = diary(planner_bytes=lambda i: 0 if i % 40 == 0 else 2e8)
    assert faults(log(), log(), [restarts], ITERATIONS) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({3: [12, 13, 14, 15, 16]}, "iteration 3 trained on samples"),
        ({3: [12, 12, 14, 15, 16, 17]}, "iteration 3 trained on samples"),
        ({5: []}, "iteration 5 trained on samples"),
    ],
    ids=["all", "lost", "twice", "an iteration that nobody ended"],
)
def test_samples_that_replicas_lose_or_see_twice_are_found(changed: dict[int, list[int]], message: str | None) -> None:
    samples = {i: list(range(BATCH * (i - 1), BATCH * i))[::-1] for i in range(1, 11)}
    even = dict.fromkeys(range(1, 11), (3.0, 1.5))
    found = wrong(even, even, samples | changed, 10)
    assert [message in line for line in found] == [True] if message else found == []
    other = even | {7: (3.1, 1.5)}
    assert wrong(other, even, samples, 10) == ["iteration 7: loss 3.1, undisturbed 3.0"]


def test_what_was_trained_last_counts(tmp_path: Path) -> None:
    """The second start trained iteration 2 again, from a checkpoint; of its third iteration one replica didn't end."""
    lines = {
        ("life0", 2): [(1, [0]), (2, [1])], ("life0", 3): [(1, [5]), (2, [6])],
        ("life1", 2): [(2, [6]), (3, [2])], ("life1", 3): [(2, [1])],
    }  # fmt: skip
    for (life, rank), trained in lines.items():
        (tmp_path / life).mkdir(exist_ok=True)
        text = "".join(json.dumps({"iteration": i, "samples": samples}) + "\n" for i, samples in trained)
        (tmp_path / life / f"samples.rank{rank}.jsonl").write_text(text)
    assert samples_of(tmp_path) == {1: [0, 5], 2: [6, 1]}


@on_cpu_ranks
@needs_megatron_training
def test_a_short_soak_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.soak.__main__ import soak

    monkeypatch.setenv("SOAK_PATIENT", "1")
    for name in ("SOAK_DIARY", "SOAK_SAMPLES", "SOAK_EVERY"):
        monkeypatch.setenv(name, "")  # set below, and to be unset again
    assert soak(20, 4, tmp_path, Console(quiet=True), forked) == []
    lines = [json.loads(line) for line in (tmp_path / "diary.rank0.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 21))
    # One fault of each kind, the late one among them, met a worker that planned. One that has ended may be noticed
    # before it has an exit code.
    text = (tmp_path / "disturbed.rank0.log").read_text()
    assert "exit code 3" in text or "EOFError" in text
    for said in ("bad message length", "a fault of the soak", "has not answered"):
        assert said in text, said
    assert lines[-1]["worker_deaths"] >= 3
    assert lines[-1]["late_plans"] + lines[-1]["fallbacks"] >= 4  # for a slow host the late one is in time
