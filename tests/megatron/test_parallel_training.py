"""Tensor and data parallelism under the real training loop: every number as in Megatron's own pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.megatron.training import Log, run, trained

pytestmark = [on_cpu_ranks, needs_megatron_training]
ITERATIONS, BATCH = 3, 4
SHARDED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
TENSOR_PARALLEL = (
    "--tensor-model-parallel-size", "2", "--sequence-parallel", "--make-vocab-size-divisible-by", "16",
)  # fmt: skip
TIED = ("--untie-embeddings-and-output-weights",)
"""Left out: embedding and head share their weights, of which the first and the last stage each hold a copy."""
CUT = {"cut": True}


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Log:
    """1F1B on two stages, ViT on the first."""
    log = run(tmp_path_factory.mktemp("megatron"), dip=False, without=TIED, options=CUT, iterations=ITERATIONS)
    assert sorted(log.losses) == [1, 2, 3]
    assert len(set(log.norms.values())) == 3
    return log


def assert_equal(ours: Log, megatrons: Log, tolerance: float = 1e-5) -> None:
    assert ours.losses == pytest.approx(megatrons.losses, rel=tolerance)
    assert ours.norms == pytest.approx(megatrons.norms, abs=2e-3)  # printed with three digits


def test_replicas_with_plans_of_their_own(megatron: Log, tmp_path: Path) -> None:
    """Distributed optimizer, reductions and gathers overlapped with the pipeline; Megatron's timers at their finest."""
    trace = tmp_path / "trace"
    log = run(
        tmp_path / "run", *SHARDED, "--timing-log-level", "2", "--dip-trace-dir", str(trace),
        ranks=4, without=TIED, options=CUT, iterations=ITERATIONS,
    )  # fmt: skip
    assert_equal(log, megatron)
    assert trained([log]) == list(range(ITERATIONS * BATCH))
    text = "\n".join(log.text)
    for timer in ("forward-backward", "forward-compute", "backward-compute", "optimizer"):
        assert timer in text, timer
    assert "has already been dispatched" not in text
    plans = [(trace / folder / "iterations.jsonl").read_text().splitlines() for folder in (".", "dp1_tp0")]
    assert [len(lines) for lines in plans] == [ITERATIONS, ITERATIONS]
    predicted = [[json.loads(line)["predicted_seconds"] for line in lines] for lines in plans]
    assert predicted[0] != predicted[1]


def test_tensor_parallel_stages_fed_by_one_rank(megatron: Log, tmp_path: Path) -> None:
    """Sequence parallel, sequences of lengths that don't divide, batches read on one rank of a stage and broadcast, and
    a data set that ends with the training."""
    log = run(
        tmp_path, *TENSOR_PARALLEL, ranks=4, without=TIED,
        options=CUT | {"broadcast": True, "limit": ITERATIONS * BATCH}, iterations=ITERATIONS,
    )  # fmt: skip
    assert_equal(log, megatron)
    # Both tensor-parallel ranks of the last stage compute the loss.
    assert trained([log]) == sorted(2 * list(range(ITERATIONS * BATCH)))


def test_context_parallel_stages(megatron: Log, tmp_path: Path) -> None:
    """Two ranks of each stage share the sequences, whose lengths don't divide; plans, read ahead, are those of all four
    ranks."""
    log = run(
        tmp_path, "--context-parallel-size", "2", ranks=4, without=TIED, options=CUT, iterations=ITERATIONS
    )  # fmt: skip
    assert_equal(log, megatron)
    assert trained([log]) == sorted(2 * list(range(ITERATIONS * BATCH)))


def test_tensor_pipeline_and_data_parallel_together(megatron: Log, tmp_path: Path) -> None:
    """Eight ranks, two of each kind, with a distributed optimizer."""
    log = run(tmp_path, *TENSOR_PARALLEL, *SHARDED, ranks=8, without=TIED, options=CUT, iterations=ITERATIONS)
    assert_equal(log, megatron)
    assert trained([log]) == sorted(2 * list(range(ITERATIONS * BATCH)))


def test_scalars_reach_tensorboard(tmp_path: Path) -> None:
    """Beside Megatron's own, one of each kind an iteration."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = tmp_path / "board"
    run(tmp_path / "run", "--tensorboard-dir", str(board), "--tensorboard-log-interval", "1", iterations=ITERATIONS)
    events = accumulator.EventAccumulator(str(board))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert "lm loss" in names
    for name in ("measured_seconds", "predicted_seconds", "bubble_ratio", "plan_seconds", "stall_seconds", "fallbacks"):
        assert [event.step for event in events.Scalars(f"dip/{name}")] == [1, 2, 3], name
