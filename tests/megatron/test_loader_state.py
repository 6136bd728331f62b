"""Data loaders that save their own state, and Megatron's older checkpoints, while batches are read ahead."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.llava_digits.runs import RunFailed
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.megatron.training import run

pytestmark = [on_cpu_ranks, needs_megatron_training]
TWO_SEGMENTS = "modules: {vision: {layers: [[1, 1]]}, language: {layers: [[1, 0], [1, 2]]}}\n"


def test_a_resumed_run_goes_on_at_the_very_sample(tmp_path: Path) -> None:
    """In the format of ``--ckpt-format torch``, whose files DIP knows again by the partition in them."""
    config = tmp_path / "dip.yaml"
    config.write_text(TWO_SEGMENTS)
    flags = ("--dataloader-type", "external", "--ckpt-format", "torch", "--dip-config", str(config))
    states = tmp_path / "states"
    whole = run(tmp_path / "whole", *flags, iterations=5, options={"loader": str(tmp_path / "unused")})
    saving = ("--save", str(tmp_path / "saved"), "--save-interval", "2", "--exit-interval", "2")
    first = run(tmp_path / "first", *flags, *saving, iterations=5, options={"loader": str(states)})
    state = next(iter(sorted(states.rglob("train_dataloader_dprank000.pt"))))
    second = run(
        tmp_path / "second", *flags, "--load", str(tmp_path / "saved"), iterations=5,
        options={"loader": str(states), "restore": str(state)},
    )  # fmt: skip
    assert (max(first.losses), min(second.losses)) == (2, 3)
    assert first.losses[1] == whole.losses[1]
    assert {i: second.losses[i] for i in (3, 5)} == pytest.approx({i: whole.losses[i] for i in (3, 5)}, rel=1e-5)
    samples = [[s["index"] for s in log.samples[-1] if s["train"]] for log in (whole, first, second)]
    assert sorted(samples[1] + samples[2]) == sorted(samples[0])
    assert sorted(samples[2]) == sorted(samples[0][8:])
    assert "can be loaded under this very partition only" in first.text[0]

    config.write_text("modules: {vision: {layers: [[1, 1]]}, language: {layers: [[2, 2]]}}\n")
    with pytest.raises(
        RunFailed, match=r"this run has vision layers \[\[1, 1\]\], language layers \[\[2, 2\]\], and files of"
    ):
        run(tmp_path / "third", *flags, "--load", str(tmp_path / "saved"), iterations=5,
            options={"loader": str(states), "restore": str(state)})  # fmt: skip
