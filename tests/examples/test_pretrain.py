"""The example under Megatron's own loop: whole training runs in processes of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from examples.llava_digits.runs import SCRIPT, Run, RunFailed, train, training_flags
from tests.forked import forked
from tests.marks import needs_megatron_training, on_cpu_ranks

pytestmark = [on_cpu_ranks, needs_megatron_training]

MEGATRON = ("--decoder-first-pipeline-num-layers", "2")


@pytest.fixture(scope="module")
def pipelined(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return pretrain(tmp_path_factory.mktemp("pp2"), *MEGATRON)


def pretrain(out: Path, *flags: str, launcher: tuple[str, ...] = ()) -> Run:
    small = ["--global-batch-size", "4", "--eval-iters", "1", "--vision-num-layers", "2"]
    command = [sys.executable, *launcher, str(SCRIPT), *training_flags(6), *small, *flags]
    return train("run", command, out, lambda *_: None, start=forked)


def test_the_pipeline_trains(pipelined: Run) -> None:
    assert sorted(pipelined.losses) == [1, 2, 3, 4, 5, 6]
    assert pipelined.losses[6] < pipelined.losses[1]
    assert pipelined.accuracy is not None
    assert 0.0 <= pipelined.accuracy <= 1.0


def test_losses_are_those_of_two_data_parallel_replicas(pipelined: Run, tmp_path: Path) -> None:
    """Two replicas of one stage see the same global batches: neither the cut of the model nor padding may matter."""
    whole = pretrain(tmp_path, "--pipeline-model-parallel-size", "1")
    assert whole.losses == pytest.approx(pipelined.losses, rel=1e-5)
    assert whole.accuracy == pytest.approx(pipelined.accuracy, abs=0.05)


@pytest.mark.parametrize("layout", ["E|ttttL", "E|t||tttL"])
def test_any_layout_trains_with_the_same_losses(pipelined: Run, tmp_path: Path, layout: str) -> None:
    """1F1B, and Megatron's interleaved schedule: the ViT in the first chunk, the language model's layers in any."""
    run = pretrain(tmp_path, "--pipeline-model-parallel-layout", layout)
    assert run.losses == pytest.approx(pipelined.losses, rel=1e-5)
    assert run.accuracy == pytest.approx(pipelined.accuracy, abs=0.05)


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="must be 1, a microbatch is one packed sequence"):
        pretrain(tmp_path, "--micro-batch-size", "2")


DIP = ("-m", "dip_megatron.cli", "run")


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_dip_trains_with_the_same_losses(pipelined: Run, tmp_path: Path, mode: str) -> None:
    """The unedited script, started through ``dip run``: each iteration runs a plan for its own batch."""
    trace = tmp_path / "trace"
    run = pretrain(tmp_path, "--dip-schedule", mode, "--dip-trace-dir", str(trace), launcher=DIP)
    assert run.losses == pytest.approx(pipelined.losses, rel=1e-5)
    assert run.accuracy == pytest.approx(pipelined.accuracy, abs=0.05)
    lines = [json.loads(line) for line in (trace / "iterations.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 7))
    assert all(line["predicted_seconds"] >= line["lower_bound"] > 0 for line in lines)
    assert json.loads((trace / "trace.json").read_text())["traceEvents"]
    assert (trace / "timeline.png").stat().st_size > 10_000


INSTALLED = ("-m", "tests.examples.installed")


def test_installed_but_off_changes_nothing(pipelined: Run, tmp_path: Path) -> None:
    run = pretrain(tmp_path, *MEGATRON, "--dip-schedule", "off", launcher=INSTALLED)
    assert run.losses == pipelined.losses
    assert run.accuracy == pipelined.accuracy


def test_a_planner_worker_killed_in_training_costs_no_step(
    pipelined: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also shows ``install()`` from inside a script."""
    monkeypatch.setenv("DIP_TEST_KILLED", "3")
    run = pretrain(tmp_path, "--dip-schedule", "dynamic", launcher=INSTALLED)
    assert (tmp_path / "run.rank0.log").read_text().count("starting another, no step is lost") == 1
    assert run.losses == pytest.approx(pipelined.losses, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pipeline-model-parallel-size", "1"), "there is no pipeline to schedule; use at least 2"),
        (("--dip-config", "nowhere.yaml"), "nowhere.yaml: can't be read"),
    ],
)
def test_dip_refuses_what_cannot_be_in_one_line(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(RunFailed, match=message):
        pretrain(tmp_path, "--dip-schedule", "dynamic", *flags, launcher=DIP)
