"""A rank that is stopped says nothing and closes nothing: the others end all the same, wherever they wait for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from examples.llava_digits.runs import SCRIPT, RunFailed, train, training_flags
from tests.forked import Forked, forked
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.patience import LONG

pytestmark = [on_cpu_ranks, needs_megatron_training]
RANKS, LITTLE = 4, 25
SMALL = ("--global-batch-size", "4", "--eval-iters", "1", "--vision-num-layers", "2")


def test_all_others_name_the_one_that_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for it in Megatron's own collectives of the optimizer, which allow ten minutes."""
    monkeypatch.setenv("DIP_TIMEOUT_SECONDS", str(LITTLE))
    ended: list[int] = []

    @contextmanager
    def start(command: Sequence[str], logs: Sequence[Path]) -> Iterator[list[Forked]]:
        with forked(command, logs) as processes:
            try:
                yield processes
            finally:
                try:
                    ended.extend(process.wait(timeout=LONG / 2) for process in processes[:-1])
                finally:
                    processes[-1].kill()  # one that is stopped is terminated by nothing else

    flags = [*training_flags(20), *SMALL, "--dip-schedule", "dynamic"]
    command = [sys.executable, "-m", "tests.megatron.stopping", str(SCRIPT), *flags]
    with pytest.raises(RunFailed, match="a rank ended with code"):
        train("run", command, tmp_path, lambda *_: None, RANKS, start)
    assert len(ended) == RANKS - 1
    assert 0 not in ended
    for rank in range(RANKS - 1):
        text = (tmp_path / f"run.rank{rank}.log").read_text()
        assert f"[dip] global rank {rank} stops where it stood: pipeline rank {rank // 2} is between iterations" in text
        assert f"no word from global rank {RANKS - 1} for {LITTLE} s: it is stopped" in text
