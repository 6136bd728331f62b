"""A GPT with experts from Megatron's own builder, in its own loop: every loss as under Megatron's own schedule."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from examples.llava_digits.runs import RunFailed
from scripts.upstream.runs import HERE, run_script

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the runs below are laid out for CPU ranks"),
    pytest.mark.skipif(importlib.util.find_spec("megatron.training") is None, reason="needs megatron.training"),
]
SCRIPT = HERE / "pretrain_tiny_gpt.py"
EXPERTS = (
    "--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type", "alltoall",
    "--moe-router-load-balancing-type", "seq_aux_loss", "--moe-aux-loss-coeff", "0.01", "--disable-bias-linear",
    "--moe-layer-freq", "[0,1,1,1]", "--moe-shared-expert-intermediate-size", "32",
    "--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias",
)  # fmt: skip
SHARDED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")


def test_replicas_with_experts_of_their_own(tmp_path: Path) -> None:
    """Two replicas of two stages: experts are reduced, and their optimizer sharded, over the replicas."""
    flags = (*EXPERTS, *SHARDED)
    whole = run_script("absent", SCRIPT, tmp_path / "whole", *flags, ranks=1)
    trace = tmp_path / "trace"
    run = run_script(
        "run", SCRIPT, tmp_path / "run", *flags, "--dip-schedule", "dynamic", "--dip-trace-dir", str(trace),
        ranks=4, pipeline=2,
    )  # fmt: skip
    assert sorted(run.losses) == [1, 2, 3, 4]
    assert run.losses == pytest.approx(whole.losses, rel=1e-5)
    assert (trace / "dp1_tp0" / "iterations.jsonl").is_file()


def test_experts_that_replicas_share_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="2 data-parallel replicas would share each group of experts"):
        run_script(
            "run", SCRIPT, tmp_path, *EXPERTS, "--expert-model-parallel-size", "2", "--dip-schedule", "dynamic",
            ranks=4, pipeline=2,
        )  # fmt: skip
