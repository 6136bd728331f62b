"""Training whose replicas exchange microbatches: the same samples, the same losses, replicas that end together."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dip_megatron.config import DipConfig
from dip_megatron.describe.files import ConfigurationError
from dip_megatron.describe.model import Parallel
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.megatron.exchange_case import slow_cluster
from tests.megatron.replica_case import Crates
from tests.megatron.training import Log, run, trained

pytestmark = [on_cpu_ranks, needs_megatron_training]
ITERATIONS, BATCH = 5, 8
FLAGS = ("--global-batch-size", str(BATCH), "--use-distributed-optimizer")
OVERLAP = "--overlap-grad-reduce"
TIED = ("--untie-embeddings-and-output-weights",)
MEAN = ("--calculate-per-token-loss",)


def train(folder: Path, *flags: str, without: tuple[str, ...] = (), stages: int = 2, **options: Any) -> Log:
    """Two replicas, of two stages if nothing else is said. Megatron's own schedule can't overlap the reduction where a
    stage has an encoder that saw no image."""
    return run(
        folder, *FLAGS, *[OVERLAP] * (stages > 1), "--log-interval", "1", *flags,
        "--pipeline-model-parallel-size", str(stages),
        ranks=2 * stages, without=(*TIED, *without),
        options={"cut": True} | options, iterations=ITERATIONS,
    )  # fmt: skip


def exchanges(trace: Path) -> list[dict[str, Any] | None]:
    return [json.loads(line)["exchange"] for line in (trace / "iterations.jsonl").read_text().splitlines()]


def same(ours: list[Log], plain: Log) -> None:
    """Losses, gradient norms and samples of one or more runs, one after the other."""
    losses = {i: loss for log in ours for i, loss in log.losses.items()}
    norms = {i: norm for log in ours for i, norm in log.norms.items()}
    assert losses == pytest.approx(plain.losses, rel=1e-5)
    assert norms == pytest.approx(plain.norms, abs=2e-3)
    by_iteration = [
        [
            sorted(s["index"] for log in logs for rank in log.samples for s in rank if s["iteration"] == i)
            for i in range(1, ITERATIONS + 1)
        ]
        for logs in (ours, [plain])
    ]
    assert by_iteration[0] == by_iteration[1]
    assert trained(ours) == list(range(ITERATIONS * BATCH))


def consumed(log: Log) -> dict[int, int]:
    """Samples, by iteration, that the loop says it has consumed."""
    return {int(i): int(n) for i, n in re.findall(r"iteration +(\d+)/.*?consumed samples: +(\d+)", log.text[-1])}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Log:
    """Without an exchange; losses weighted by tokens."""
    return train(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No host is too busy for an exchange."""
    slow = tmp_path / "slow.yaml"
    slow.write_text(slow_cluster())
    monkeypatch.setenv("DIP_CLUSTER", str(slow))
    monkeypatch.setenv("DIP_RECALIBRATE", "false")


@pytest.mark.usefixtures("worth_it")
def test_replicas_that_exchange_train_the_same(plain: Log, tmp_path: Path) -> None:
    board = tmp_path / "board"
    swapped = train(
        tmp_path / "swapped", "--dip-balance", "swap", "--dip-trace-dir", str(tmp_path / "swap"),
        "--tensorboard-dir", str(board), "--tensorboard-log-interval", "1",
    )  # fmt: skip
    same([swapped], plain)
    found = exchanges(tmp_path / "swap")
    assert found[0] is None  # the first microbatches are read when they are to run
    moved = [e for e in found[1:] if e is not None and e["moved"]]
    assert len(found) == ITERATIONS
    assert all(e is not None for e in found[1:])
    assert moved
    assert all(e["sent_bytes"] > 0 and not e["reason"] for e in moved)
    line = re.search(r"slowest replica ([\d.]+) of the mean, ([\d.]+) after [1-9]\d* moved \(", swapped.text[-1])
    assert line is not None
    assert float(line[1]) > float(line[2])
    assert all(
        {sum(s["iteration"] == i for s in swapped.samples[rank]) for i in range(1, ITERATIONS + 1)} == {BATCH // 2}
        for rank in (2, 3)
    )
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(board))
    events.Reload()
    for name, key in (
        ("slowest_replica_before", "before"),
        ("slowest_replica_after", "after"),
        ("microbatches_moved", "moved"),
    ):
        written = {event.step: event.value for event in events.Scalars(f"dip/{name}")}
        assert written == pytest.approx({i: e[key] for i, e in enumerate(found, 1) if e is not None}), name


def test_replicas_of_other_numbers_of_microbatches_train_the_same(plain: Log, tmp_path: Path) -> None:
    """With a restart in between."""
    free = (
        "--dip-balance", "free", "--save", str(tmp_path / "saved"), "--save-interval", "1000",
        "--dist-ckpt-optim-fully-reshardable",
    )  # fmt: skip
    first = train(tmp_path / "first", *free, "--exit-interval", "3", uneven=1)
    second = train(tmp_path / "second", *free, "--load", str(tmp_path / "saved"), uneven=1)
    assert (list(first.losses), list(second.losses)) == ([1, 2, 3], [4, 5])
    # Megatron's log takes a run's first iteration into the mean loss of the second, too.
    second.losses[5] = 2 * second.losses[5] - second.losses[4]
    same([first, second], plain)
    assert consumed(first) | consumed(second) == consumed(plain)
    counts = [sum(s["iteration"] == i for s in log.samples[3]) for log in (first, second) for i in log.losses]
    assert counts == [4, 3, 3, 4, 3]  # what a run reads first stays where it is


@pytest.mark.usefixtures("worth_it")
def test_a_loop_that_is_not_read_ahead_exchanges_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And averages over means of microbatches; whose replicas have no pipeline."""
    plain = train(tmp_path / "plain", "--dip-schedule", "off", without=MEAN, stages=1)
    monkeypatch.setenv("DIP_READ_AHEAD", "false")
    trace = tmp_path / "trace"
    swapped = train(
        tmp_path / "swapped", OVERLAP, "--dip-balance", "swap", "--dip-trace-dir", str(trace), without=MEAN, stages=1
    )  # fmt: skip
    same([swapped], plain)
    found = exchanges(trace)
    assert all(e is not None and e["stall_seconds"] == e["seconds"] > 0 for e in found)
    assert all(e is not None and bool(e["moved"]) != bool(e["reason"]) for e in found)
    assert any(e is not None and e["moved"] for e in found)
    assert any("while training waits" in text for text in swapped.text)


def test_counts_move_only_where_losses_are_weighted_by_tokens() -> None:
    config = DipConfig(schedule="dynamic", balance="free")
    with pytest.raises(ConfigurationError, match="averages over microbatches, not over tokens; use --calculate-per"):
        begin(config)
    begin(config, weights_by_tokens=True)


@pytest.mark.parametrize(
    ("settings", "loop", "reason"),
    [
        ({}, {}, "nothing says how this loop's microbatches are split into samples and packed"),
        ({}, {"samples": Crates()}, "this loop averages over microbatches"),
        ({"balance": "off"}, {"samples": Crates(), "weights_by_tokens": True}, "ask for --dip-balance swap or free"),
        (
            {}, {"samples": Crates(), "weights_by_tokens": True, "parallel": Parallel(1, 2, 2, False, False, 1, 2)},
            "replicas that share experts exchange whole microbatches alone",
        ),
    ],
)  # fmt: skip
def test_samples_move_only_where_the_loop_packs_them_and_weights_by_tokens(
    settings: dict[str, Any], loop: dict[str, Any], reason: str
) -> None:
    config = DipConfig(**{"schedule": "dynamic", "balance": "swap", "resample": True, **settings})
    with pytest.raises(ConfigurationError, match=f"resample: .*{reason}"):
        begin(config, **loop)
    begin(config.model_copy(update={"balance": "swap"}), samples=Crates(), weights_by_tokens=True)


def begin(config: DipConfig, **loop: Any) -> None:
    """A run, as far as it is refused before anything is built."""
    from dip_megatron.megatron.adapters.loop import LoopSettings, TrainingLoop
    from dip_megatron.megatron.session import DipSession

    parallel = loop.pop("parallel", Parallel(1, 2, 2, False, False))
    DipSession(TrainingLoop(LoopSettings(parallel, 1, 4, **loop)), config, []).close()
