"""``dip estimate`` of real scripts, on one process that takes itself for a rank of a larger job."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dip_megatron.cli import main
from dip_megatron.compat.releases import has_training_loop
from dip_megatron.describe.cost import Costs
from tests.forked import Forked, done
from tests.patience import LONG

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "llava_digits" / "pretrain_llava_digits.py"
FLAGS = shlex.split((SCRIPT.parent / "quickstart.args").read_text(), comments=True)

needs_training = pytest.mark.skipif(not has_training_loop(), reason="this Megatron-Core has no megatron.training")


ESTIMATE = ("-m", "dip_megatron.cli", "estimate")


@needs_training
def test_a_script_as_it_is_on_16_gpus_and_its_own_data() -> None:
    """By a new Python: what is loaded is part of what pretends."""
    flags = [*FLAGS, "--pipeline-model-parallel-size", "2", "--global-batch-size", "64", "--train-iters", "10"]
    options = ["--gpus", "16", "--iterations", "1", "--budget", "0.05", "--json", str(SCRIPT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, *ESTIMATE, *options, *flags], env=environment, capture_output=True, text=True, timeout=LONG
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "vision 11 layers" in ended.stderr
    assert "TP 1 x PP 2 x DP 8 on 16 GPUs, 8 microbatches a replica and iteration" in ended.stderr
    told = json.loads(ended.stdout)["estimate"]
    assert told["replicas"] == 5  # the script's data sets hold no more
    assert list(told["outcomes"]) == ["today", "megatron", "dip", "balanced"]
    outcomes = told["outcomes"]
    assert outcomes["dip"]["job_seconds"] < outcomes["today"]["job_seconds"]
    assert told["gain"] > 1
    assert outcomes["today"]["layout"] == "1 stage a rank: stem 11 vision head + stem 1 language | 1 language head"


@needs_training
def test_a_named_workload_a_given_layout_and_a_refusal(tmp_path: Path) -> None:
    """By forked processes, because each pretends to be one of many."""
    flags = [str(SCRIPT), *FLAGS, "--pipeline-model-parallel-size", "2", "--train-iters", "10"]
    options = ["--workload", "vlm-mix", "--iterations", "1", "--budget", "0.05"]
    told = done([*ESTIMATE, *options, *flags, "--pipeline-model-parallel-layout", "E|ttL"], tmp_path)
    assert told.status == 0, told.err[-3000:]
    assert "as the script is: 1 stage a rank: stem 11 vision head | stem 2 language head" in told.out
    assert "x DIP's" in told.out
    assert f"dip_megatron.cli run {SCRIPT} ... --dip-schedule dynamic" in told.out
    refused = done([*ESTIMATE, *flags, "--no-such-flag"], tmp_path)
    assert refused.status == 2
    assert "ended before its first iteration" in refused.err
    assert "--no-such-flag" in refused.err


@needs_training
def test_a_script_is_measured_on_its_own_data(tmp_path: Path) -> None:
    flags = shlex.split((SCRIPT.parent / "tiny.args").read_text(), comments=True)
    costs, log = tmp_path / "costs.json", tmp_path / "log"
    command = ["python", "-m", "dip_megatron.cli", "profile", "--repeats", "1", "-o", str(costs), str(SCRIPT), *flags]
    pipeline = ["--pipeline-model-parallel-size", "2", "--train-iters", "10"]
    process = Forked([*command, *pipeline], os.environ | {"OMP_NUM_THREADS": "1"}, log)
    assert process.wait(LONG) == 0, log.read_text()[-3000:]
    tables = Costs.load(costs).tables
    assert {(t.module, t.part) for t in tables if t.part != "stage"} == {
        (module, part) for module in ("vision", "language") for part in ("stem", "layer", "head")
    }
    seen = {t.tokens for t in tables if t.module == "vision"}
    assert len(seen) == 1
    assert len(seen.pop()) > 2  # microbatches of several numbers of pictures, whole and in parts


def test_sizes_that_are_no_numbers_are_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["estimate", str(SCRIPT), "--pipeline-model-parallel-size", "two"])
    assert ended.value.code == 2
    assert "--pipeline-model-parallel-size two: not a number of GPUs" in capsys.readouterr().err
