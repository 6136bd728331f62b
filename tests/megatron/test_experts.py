"""A GPT with experts from Megatron's own builder, in its own loop: every loss as under Megatron's own schedule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from examples.llava_digits.runs import Run, RunFailed
from tests.forked import forked
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.upstream.runs import HERE, run_script

pytestmark = [on_cpu_ranks, needs_megatron_training]
SCRIPT = HERE / "pretrain_tiny_gpt.py"
EXPERTS = (
    "--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type", "alltoall",
    "--moe-router-load-balancing-type", "seq_aux_loss", "--moe-aux-loss-coeff", "0.01", "--disable-bias-linear",
    "--moe-layer-freq", "[0,1,1,1]", "--moe-shared-expert-intermediate-size", "32",
    "--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias",
)  # fmt: skip
SHARDED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")


def both(folder: Path, *flags: str, spread: Sequence[str] = ()) -> tuple[Run, Run, Path]:
    """Of one rank without DIP, and of two replicas of two stages under it, experts standing as ``spread`` says; with
    the folder of the latter's traces."""
    flags, trace = (*EXPERTS, *SHARDED, *flags), folder / "trace"
    whole = run_script("absent", SCRIPT, folder / "whole", *flags, ranks=1, start=forked)
    run = run_script(
        "run", SCRIPT, folder / "run", *flags, *spread, "--dip-schedule", "dynamic", "--dip-trace-dir", str(trace),
        ranks=4, pipeline=2, start=forked,
    )  # fmt: skip
    return whole, run, trace


def predicted(trace: Path) -> list[list[float]]:
    """Of each replica, seconds of each iteration."""
    lines = [(trace / place / "iterations.jsonl").read_text().splitlines() for place in (".", "dp1_tp0")]
    return [[json.loads(line)["predicted_seconds"] for line in of_replica] for of_replica in lines]


def test_replicas_with_experts_of_their_own(tmp_path: Path) -> None:
    """Two replicas of two stages: experts are reduced, and their optimizer sharded, over the replicas."""
    whole, run, trace = both(tmp_path)
    assert sorted(run.losses) == [1, 2, 3, 4]
    assert run.losses == pytest.approx(whole.losses, rel=1e-5)
    assert (trace / "dp1_tp0" / "iterations.jsonl").is_file()


def test_replicas_whose_experts_are_balanced_together(tmp_path: Path) -> None:
    """A loss over all replicas' tokens per expert joins them, although each has all experts: they plan together. It
    goes by the order of microbatches, so that losses are the same until weights have stepped by it, and close then."""
    whole, run, trace = both(tmp_path, "--moe-router-load-balancing-type", "global_aux_loss")
    assert run.losses[1] == pytest.approx(whole.losses[1], rel=1e-6)
    assert run.losses == pytest.approx(whole.losses, rel=1e-3)
    first, second = predicted(trace)
    assert first == second  # the time of both together


def test_replicas_that_share_experts(tmp_path: Path) -> None:
    """Plans are made for both together and read ahead, with an evaluation at the end. The partition found leaves a
    layer with experts beside those of multi-token prediction."""
    spread = ("--expert-model-parallel-size", "2")
    whole, run, trace = both(tmp_path, "--mtp-num-layers", "1", spread=spread)
    assert run.losses == pytest.approx(whole.losses, rel=1e-5)
    first, second = predicted(trace)
    assert first == second  # the time of both together
    assert first[0] == first[2] != first[3]  # by when stages have corrected the costs


def test_groups_of_replicas_that_share_experts(tmp_path: Path) -> None:
    """Four replicas of two stages: in two groups, each with plans of its own, that exchange microbatches; in one."""
    flags = (*EXPERTS, *SHARDED, "--global-batch-size", "16")
    whole = run_script("absent", SCRIPT, tmp_path / "whole", *flags, ranks=1, start=forked)
    for spread, more in (("2", ("--dip-balance", "swap")), ("4", ())):
        run = run_script(
            "run", SCRIPT, tmp_path / spread, *flags, *more, "--expert-model-parallel-size", spread, "--dip-schedule",
            "dynamic", ranks=8, pipeline=2, start=forked,
        )  # fmt: skip
        assert run.losses == pytest.approx(whole.losses, rel=1e-5), spread


def test_what_replicas_that_share_experts_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"replicas that share experts and balance free: .* use balance swap"):
        run_script(
            "run", SCRIPT, tmp_path, *EXPERTS, "--expert-model-parallel-size", "2", "--dip-schedule", "dynamic",
            "--calculate-per-token-loss", "--dip-balance", "free", ranks=4, pipeline=2, start=forked,
        )  # fmt: skip
