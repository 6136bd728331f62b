"""Half precision under the real training loop: loss scales, skipped iterations, main gradients in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.megatron.training import run

pytestmark = [on_cpu_ranks, needs_megatron_training]


def test_fp16_with_a_loss_scale_that_is_searched_for(tmp_path: Path) -> None:
    """Too high a scale overflows: the iteration is skipped, the scale halved. It is the same iterations for both."""
    flags = ("--fp16", "--initial-loss-scale", "256", "--hysteresis", "1", "--loss-scale-window", "2")
    megatrons = run(tmp_path / "megatron", *flags, dip=False, iterations=6)
    ours = run(tmp_path / "dip", *flags, iterations=6)
    assert len(set(megatrons.scales.values())) > 1
    assert 0 < len(megatrons.losses) < 6
    assert ours.scales == megatrons.scales
    assert ours.losses == pytest.approx(megatrons.losses, rel=2e-3)
    assert ours.norms == pytest.approx(megatrons.norms, rel=2e-2)


def test_bf16_with_main_gradients_in_fp32(tmp_path: Path) -> None:
    """Two replicas with a distributed optimizer whose communication overlaps. Megatron's own pipeline ends with an
    error there when the last microbatch has no images, so it runs without overlap."""
    flags = ("--bf16", "--use-distributed-optimizer")
    megatrons = run(tmp_path / "megatron", *flags, dip=False)
    ours = run(tmp_path / "dip", *flags, "--overlap-grad-reduce", "--overlap-param-gather", ranks=4)
    assert ours.losses == pytest.approx(megatrons.losses, rel=3e-4)
    assert ours.norms == pytest.approx(megatrons.norms, rel=3e-3)
