"""Microbatches longest first under Megatron's own schedule: the same numbers, in another order."""

from __future__ import annotations

from pathlib import Path

import pytest

from dip_megatron.environment import asks, load_settings
from tests.marks import needs_megatron_training, on_cpu_ranks
from tests.megatron.training import run

pytestmark = on_cpu_ranks
ITERATIONS = 3


def test_flag_environment_and_file_ask_for_it(tmp_path: Path) -> None:
    file = tmp_path / "dip.yaml"
    file.write_text("pairing: true\n")
    for flags, environment in (({"pairing": True}, {}), ({}, {"DIP_PAIRING": "true"}), ({"config": file}, {})):
        config = load_settings(flags, environment).config
        assert config.pairs
        assert not config.on
    assert asks({"DIP_PAIRING": "true"})
    assert not load_settings({"pairing": True, "schedule": "dynamic"}, {}).config.pairs


@needs_megatron_training
def test_two_replicas_give_the_longest_first(tmp_path: Path) -> None:
    """1F1B on two stages, ViT on the first; every replica has four microbatches an iteration, of equal sequences: what
    has more images takes longer."""
    flags = ("--global-batch-size", "8")
    plain = run(tmp_path / "plain", *flags, ranks=4, dip=False, iterations=ITERATIONS)
    paired = run(tmp_path / "paired", *flags, "--dip-pairing", ranks=4, dip=False, iterations=ITERATIONS)
    assert paired.losses == pytest.approx(plain.losses, rel=1e-5)
    assert paired.norms == pytest.approx(plain.norms, abs=2e-3)
    changed = False
    for before, after in zip(plain.samples, paired.samples, strict=True):
        for iteration in range(1, ITERATIONS + 1):
            old, new = ([s for s in side if s["iteration"] == iteration] for side in (before, after))
            assert sorted(s["index"] for s in new) == sorted(s["index"] for s in old)
            images = [s["images"] for s in new]
            assert images == sorted(images, reverse=True)
            changed |= [s["index"] for s in new] != [s["index"] for s in old]
    assert changed
