"""Nothing is lost, repeated or changed by what interrupts training: evaluations, growing batches, iterations that are
repeated, signals, restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.llava_digits.runs import RunFailed
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.megatron.training import read, run, trained

pytestmark = [on_cpu_ranks, needs_megatron_training]
SEQUENCE = 192
SAMPLES = 18
GROWING = (
    "--train-samples", str(SAMPLES), "--step-batch-size-schedule", f"0:2 {6 * SEQUENCE}:4",
    "--eval-interval", "2", "--eval-iters", "1", "--eval-global-batch-size", "2",
)  # fmt: skip
WITHOUT = ("--train-iters", "--lr-warmup-iters", "--global-batch-size", "--eval-interval", "--eval-iters")
PARTITION = "modules: {vision: {segments: 1, unit_size: 2}, language: {segments: 2}}\n"


def test_interrupted_training_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Batches of 2, 2, 2, 4, 4 and 4 with an evaluation after every other one. Under DIP the second iteration is
    repeated by Megatron's rerun state machine, and a signal ends the fourth; a second run resumes there."""
    config = tmp_path / "dip.yaml"
    config.write_text(PARTITION)
    dip = (
        *GROWING, "--dip-config", str(config), "--save", str(tmp_path / "saved"), "--save-interval", "1000",
        "--exit-signal-handler",
    )  # fmt: skip
    whole = run(tmp_path / "whole", *GROWING, without=WITHOUT, dip=False)
    options = {"reject": 3, "fatal": False, "signal": 4}
    first = run(tmp_path / "first", *dip, without=WITHOUT, options=options)
    second = run(tmp_path / "second", *dip, "--load", str(tmp_path / "saved"), without=WITHOUT)

    assert (list(first.losses), list(second.losses)) == ([1, 2, 3, 4], [5, 6])
    # Megatron's log takes a run's first iteration into the mean loss of the second, too.
    second.losses[6] = 2 * second.losses[6] - second.losses[5]
    assert first.losses | second.losses == pytest.approx(whole.losses, rel=1e-5)
    assert first.norms | second.norms == pytest.approx(whole.norms, abs=2e-3)
    assert first.evaluations | second.evaluations == pytest.approx(whole.evaluations, rel=1e-5)
    assert len(whole.evaluations) == 5

    by_iteration = [[s["index"] for s in first.samples[-1] if s["iteration"] == i] for i in range(1, 5)]
    repeated = by_iteration[1][2:]
    assert repeated == by_iteration[1][:2]
    assert trained([first, second]) == sorted([*range(SAMPLES), *repeated])
    evaluated = [s["index"] for log in (first, second) for s in log.samples[-1] if not s["train"]]
    assert sorted(evaluated) == sorted(s["index"] for s in whole.samples[-1] if not s["train"])


def test_a_suspicious_result_is_examined_after_a_restart(tmp_path: Path) -> None:
    """Megatron repeats the iteration at once and, as the result is the same, again on another host: the same loss is
    found there, although the plan is another."""
    config = tmp_path / "dip.yaml"
    config.write_text(PARTITION)
    saved = (
        "--dip-config", str(config), "--save", str(tmp_path / "saved"), "--save-interval", "1000",
        "--load", str(tmp_path / "saved"),
    )  # fmt: skip
    options = {"reject": 6, "fatal": True}
    with pytest.raises(RunFailed, match="ended with code 16"):
        run(tmp_path / "first", *saved, options=options | {"node": "here"})
    log = read(tmp_path / "first", 2)
    assert [s["iteration"] for s in log.samples[-1]] == [1] * 4 + [2] * 8
    assert log.samples[-1][4:8] == log.samples[-1][8:]
    assert "unexpected result is reproducible within the tolerance" in log.text[-1]

    with pytest.raises(RunFailed, match="ended with code 17"):
        run(tmp_path / "second", *saved, options=options | {"node": "there", "reject": -1})
    again = read(tmp_path / "second", 2)
    assert {s["index"] for s in again.samples[-1]} == {s["index"] for s in log.samples[-1][4:8]}
    assert "reproducible on a different GPU, therefore it was likely correct" in again.text[-1]
