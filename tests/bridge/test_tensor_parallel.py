"""Two tensor-parallel ranks a stage: gradients of each rank's shards are those of Megatron's own schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bridge import equality
from tests.bridge.equality import Case, together
from tests.bridge.test_families import assert_equal, partitions
from tests.bridge.tiny import TINY
from tests.processes import Team

SEED = 3


@pytest.mark.parametrize(("name", "cut", "sequence"), [
    ("qwen2-5-vl", "several", False), ("qwen2-5-vl", "replicated", True), ("qwen3-vl", "several", True),
])  # fmt: skip
def test_shards_train_as_the_class_does(name: str, cut: str, sequence: bool, tmp_path: Path) -> None:
    tiny = TINY[name]
    tiny.save(tmp_path)
    case = Case(name, tmp_path, partitions(tiny)[cut], seed=SEED, tensor=2, sequence=sequence)
    two, four = Team(2), Team(4)  # of their own: groups of Megatron's are made once
    try:
        alone = two.run(equality.megatrons, replace(case, layers={}))
        ranks = four.run(equality.dips, case)
    finally:
        two.close()
        four.close()
    for shard in range(2):
        assert_equal((ranks[2 + shard][0], together([ranks[stage + shard][1] for stage in (0, 2)])), alone[shard])
