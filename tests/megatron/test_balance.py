"""Training whose replicas exchange microbatches: the same samples, the same losses, replicas that end together."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tests.megatron.training import Log, run, trained

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the runs below are laid out for CPU ranks"),
    pytest.mark.skipif(importlib.util.find_spec("megatron.training") is None, reason="needs megatron.training"),
]
ITERATIONS, BATCH = 5, 8
FLAGS = ("--global-batch-size", str(BATCH), "--use-distributed-optimizer", "--overlap-grad-reduce")
TIED = ("--untie-embeddings-and-output-weights",)


def train(folder: Path, *flags: str, without: tuple[str, ...] = ()) -> Log:
    return run(folder, *FLAGS, *flags, ranks=4, without=(*TIED, *without), options={"cut": True}, iterations=ITERATIONS)


@pytest.mark.parametrize("without", [(), ("--calculate-per-token-loss",)], ids=["per token", "mean of means"])
def test_replicas_that_exchange_train_the_same(tmp_path: Path, without: tuple[str, ...]) -> None:
    """Two replicas of two stages."""
    plain = train(tmp_path / "plain", without=without)
    trace = tmp_path / "trace"
    swapped = train(
        tmp_path / "swapped", "--dip-balance", "swap", "--dip-trace-dir", str(trace), "--log-interval", "1",
        without=without,
    )  # fmt: skip
    assert swapped.losses == pytest.approx(plain.losses, rel=1e-5)
    assert swapped.norms == pytest.approx(plain.norms, abs=2e-3)
    assert trained([swapped]) == trained([plain]) == list(range(ITERATIONS * BATCH))
    lines = [json.loads(line) for line in (trace / "iterations.jsonl").read_text().splitlines()]
    exchanges = [line["exchange"] for line in lines]
    assert exchanges[0] is None  # the first microbatches are read when they are to run
    assert all(e is not None for e in exchanges[1:])
    moved = [e for e in exchanges[1:] if e["moved"]]
    assert moved
    assert all(e["after"] <= e["before"] and e["sent_bytes"] > 0 and not e["reason"] for e in moved)
    assert any("slowest replica" in text for text in swapped.text)
