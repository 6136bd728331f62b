"""Text to video under Megatron's own loop: whole training runs in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.utils import Split

from dip_megatron.ports import held_port
from scripts.t2v.digits import (
    CLIPS,
    FRAMES,
    MOVES,
    SMALL,
    TALL,
    VOCABULARY,
    WIDE,
    WORDS,
    PackedClips,
    Scans,
    to_frames,
    to_latent,
)  # fmt: skip
from tests.drawn import settings
from tests.forked import forked
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.patience import LONG

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "pretrain_t2v.py"
CONFIG = ROOT / "configs" / "train" / "t2v_tiny_cpu.yaml"
DIP = ("-m", "dip_megatron.cli", "run")

SMALL_RUN = (
    "--train-iters", "4", "--lr-warmup-iters", "1", "--log-interval", "1", "--eval-iters", "1", "--sample-steps", "2",
)  # fmt: skip


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"flow loss: ([\d.E+-]+)", text)]


def pretrain(out: Path, ranks: int, launcher: tuple[str, ...], *flags: str) -> str:
    """All that the last rank prints."""
    out.mkdir(parents=True, exist_ok=True)
    logs = [out / f"rank{rank}.log" for rank in range(ranks)]
    command = [sys.executable, *launcher, str(SCRIPT), *SMALL_RUN, "--picture", str(out / "samples.png"), *flags]
    with forked(command, logs) as processes:
        codes = [process.wait(timeout=LONG) for process in processes]
    text = logs[-1].read_text()
    assert codes == [0] * ranks, text[-5000:]
    return text


@pytest.fixture(scope="module")
def megatrons(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(pretrain(tmp_path_factory.mktemp("megatron"), 1, (), "--pipeline-model-parallel-size", "1"))


@on_cpu_ranks
@needs_megatron_training
def test_the_documented_command_trains_with_megatrons_losses(megatrons, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command = [*DIP, str(SCRIPT), "--dip-config", str(CONFIG), *SMALL_RUN]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with held_port() as port:
        run = subprocess.run(
            [*torchrun, f"--master-port={port}", *command],
            env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=LONG,
        )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]
    assert "can't defer weight gradients" not in run.stdout + run.stderr
    assert (tmp_path / "out" / "t2v" / "samples.png").stat().st_size > 5000
    assert len(megatrons) == 4
    assert losses(run.stdout) == pytest.approx(megatrons, rel=1e-5)


@on_cpu_ranks
@needs_megatron_training
@pytest.mark.parametrize("schedule", ["megatron-1f1b", "megatron-interleaved", "zb-v"])
def test_static_schedules_over_both_modules_train_with_megatrons_losses(schedule, megatrons, tmp_path):
    assert losses(pretrain(tmp_path, 2, DIP, "--dip-schedule", schedule)) == pytest.approx(megatrons, rel=1e-5)


@on_cpu_ranks
@needs_megatron_training
def test_a_frozen_text_encoder_changes_no_losses(tmp_path):
    frozen = ("--freeze-text-encoder",)
    ours = losses(pretrain(tmp_path / "dip", 2, DIP, "--dip-config", str(CONFIG), *frozen))
    theirs = losses(pretrain(tmp_path / "megatron", 1, (), "--pipeline-model-parallel-size", "1", *frozen))
    assert len(theirs) == 4
    assert ours == pytest.approx(theirs, rel=1e-5)


def scans():
    random = np.random.default_rng(0)
    return Scans(random.uniform(-1, 1, (5, 8, 8)).astype(np.float32), np.arange(5))


def test_clips_are_of_all_sizes_and_show_whole_digits():
    data, seen = PackedClips(scans(), Split.train, 40, seed=1), set()
    for item in (data[i] for i in range(40)):
        assert CLIPS[0] <= len(item["latents"]) == len(item["prompt_lengths"]) == len(item["timesteps"]) <= CLIPS[1]
        assert sum(item["prompt_lengths"]) == len(item["tokens"])
        for latent, noise in zip(item["latents"], item["noise"], strict=True):
            assert noise.shape == latent.shape
            frames = to_frames(latent)
            seen.add(frames.shape)
            for frame in frames:
                assert any(np.isclose(frame[frame > -1].sum(), scan.sum(), atol=1e-3) for scan in scans().pixels)
    assert seen == {(count, *canvas) for count in FRAMES for canvas in (SMALL, WIDE, TALL)}
    assert len(WORDS) < VOCABULARY
    assert set(MOVES) < set(WORDS)


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), st.integers(0, 99))
def test_latents_are_pixels_in_another_order(grid, seed):
    frames = np.random.default_rng(seed).normal(size=tuple(2 * n for n in grid)).astype(np.float32)
    latent = to_latent(frames)
    assert latent.shape == (8, *grid)
    np.testing.assert_array_equal(to_frames(latent), frames)
