from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from dip_megatron.describe.model import load_model
from dip_megatron.describe.workload import load_workload
from examples.llava_digits import quickstart, runs
from examples.llava_digits.comparison import WARM_UP, compare, gains, planner_lines
from examples.llava_digits.ratios import MIX, encoder_share, quickstart_microbatches, quickstart_model
from examples.llava_digits.runs import Run, RunFailed, train

ITERATION = (
    " [2026-01-01 00:00:00.000000] iteration {i:8d}/      20 | consumed samples:           96 | "
    "elapsed time per iteration (ms): {ms:.1f} | learning rate: 1.481995E-03 | global batch size:     8 | "
    "lm loss: {loss:.6E} | digit accuracy: 1.250000E-01 | loss scale: 1.0 | grad norm: 1.500 |"
)
HELD_OUT = (
    " validation loss at iteration 20 on test set | lm loss value: 2.3E+00 | lm loss PPL: 1.0E+01 | "
    "digit accuracy value: 8.318965E-01 | digit accuracy PPL: 2.2E+00 | "
)


def finished(milliseconds: float, shift: float = 0.0) -> Run:
    run = Run()
    for i in range(1, 21):
        assert run.read(ITERATION.format(i=i, ms=milliseconds, loss=3.0 - 0.1 * i + shift)) == i
    assert run.read(HELD_OUT) is None
    return run


def test_megatrons_log_is_read() -> None:
    run = finished(250.0)
    assert run.seconds[7] == pytest.approx(0.25)
    assert run.losses[20] == pytest.approx(1.0)
    assert run.accuracy == pytest.approx(0.8318965)
    assert run.read("some other line") is None


def planned(iteration: int) -> dict[str, float | int | bool | str]:
    return {
        "iteration": iteration, "iteration_seconds": 0.2, "predicted_seconds": 0.22, "lower_bound": 0.2,
        "bubble_ratio_planned": 0.1, "bubble_ratio_measured": 0.15, "plan_seconds": 0.02 if iteration else 9.0,
        "stall_seconds": 0.001, "evaluations": 10, "fallback": False, "schedule": "dip",
    }  # fmt: skip


def test_the_table_compares_the_runs(tmp_path: Path) -> None:
    (tmp_path / "iterations.jsonl").write_text("".join(json.dumps(planned(i)) + "\n" for i in range(20)))
    lines = planner_lines(tmp_path)
    assert len(lines) == 20 - WARM_UP
    finishes = {
        "Megatron 1F1B": finished(300.0),
        "Megatron interleaved": finished(260.0),
        "DIP": finished(200.0, shift=1e-4),
    }
    assert gains(finishes) == pytest.approx({"Megatron 1F1B": 1.5, "Megatron interleaved": 1.3})
    console = Console(width=120, record=True)
    console.print(compare(finishes, lines))
    text = console.export_text()
    for part in ("300.0 ms", "260.0 ms", "200.0 ms", "1.50 x", "1.30 x", "1.000000", "1.0e-04", "83.2%", "20.0 ms",
                 "0.909 x", "1.100 x", "10.0%", "15.0%"):  # fmt: skip
        assert part in text


def test_the_model_divides_its_work_as_a_real_one() -> None:
    real = load_model("vlm-s")
    batches = load_workload(MIX, real, 40, 16)
    theirs = encoder_share(real, [m for batch in batches for m in batch.microbatches])
    assert encoder_share(quickstart_model(), quickstart_microbatches(640)) == pytest.approx(theirs, rel=0.1)


def test_missing_planner_lines_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"iterations\.jsonl"):
        planner_lines(tmp_path)


def test_a_failing_rank_ends_the_others(tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '0': sys.exit('dip: this and that; do something else')\n"
        "time.sleep(3600)\n"
    )
    with pytest.raises(RunFailed, match="dip: this and that; do something else"):
        train("run", [sys.executable, "-c", program], tmp_path, lambda *_: None)


def test_silence_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SILENCE", 0.5)
    with pytest.raises(RunFailed, match="no sign of life"):
        train("run", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, lambda *_: None)


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(quickstart.main, ["--out", str(tmp_path / "file")])
    assert result.exit_code == 1
    assert "name a folder that can be written" in result.output
