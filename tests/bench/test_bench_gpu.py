"""The GPU benchmark, on CPU processes and a tiny model: every schedule runs, and all train the same."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as bench_gpu
from benchmarks.gpu import mps, setting
from benchmarks.shared import ranks
from dip_megatron.describe.workload import Microbatch
from tests.bench.forked_ranks import run_script

SCHEDULES = "megatron-1f1b,megatron-interleaved,zb-v,dip-paper,dip"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    printed = run_script(
        bench_gpu.main,
        ["--size", "tiny", "--batches", "2", "--microbatches", "5", "--schedules", SCHEDULES, "--search", "0.2",
         "--partition-search", "1", "--workers", "1", "--no-mps", "--memory-gb", "2", "--limit", "500", "--out",
         str(out)],
        out,
    )  # fmt: skip
    return printed, json.loads((out / "results.json").read_text()), out


def test_every_schedule_trains_the_same(bench):
    _, record, _ = bench
    runs = [result["iterations"] for result in record["results"]]
    assert [len(r) for r in runs] == [2] * 5
    for run in runs[1:]:
        for ours, theirs in zip(run, runs[0], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-5)
            assert ours["flops"] == theirs["flops"]
    assert runs[0][0]["loss"] != runs[0][1]["loss"]


def test_the_table_and_traces_are_there(bench):
    printed, record, out = bench
    for name in SCHEDULES.split(","):
        assert name in printed
        lanes = {e["args"]["name"] for e in json.loads((out / f"trace-{name}.json").read_text())["traceEvents"]
                 if e["name"] == "thread_name"}  # fmt: skip
        assert lanes == {"planned", "measured"}
    for line in record["summary"]:
        assert 0 < line["bubble_measured"] < 1
        assert line["loss_difference"] < 1e-5


def test_flops_are_those_of_the_products():
    model = setting.model_of(setting.Setting())
    text = setting.training_flops(model, (Microbatch(1000),))
    language = model.module("language")
    expected = 6 * 1000 * (24 * language.layer.parameters + 32000 * 2048) + 24 * 6 * 1000**2 * 2048
    assert text == pytest.approx(expected)
    assert setting.training_flops(model, (Microbatch(831, (169,)),)) > text


def test_without_the_service_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(mps, "_PLACES", ())
    with pytest.raises(mps.MpsError, match="--no-mps"), mps.divided_gpu(12, 10):
        pass


def test_the_service_is_private_and_stopped(monkeypatch, tmp_path):
    """A stand-in for the control program writes down how it is called."""
    calls = tmp_path / "calls"
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text(
        f'#!/bin/sh\necho "$@ $CUDA_MPS_PIPE_DIRECTORY" >>{calls}\n[ $# = 0 ] && cat >>{calls}\nexit 0\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with mps.divided_gpu(12, 10) as environment:
        pipe = environment["CUDA_MPS_PIPE_DIRECTORY"]
        assert Path(pipe).is_dir()
        assert environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "12"
    assert calls.read_text().splitlines() == [f"-d {pipe}", f" {pipe}", "quit"]
    assert not Path(pipe).exists()


def test_a_failing_rank_ends_all_and_shows_its_last_words(tmp_path, capsys):
    code = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('no more')\ntime.sleep(600)"
    assert ranks.run_ranks([sys.executable, "-c", code], 2, tmp_path, 500.0) == 1
    assert "no more" in capsys.readouterr().out
