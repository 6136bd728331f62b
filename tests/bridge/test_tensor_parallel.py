"""Two tensor-parallel ranks a stage: gradients of each rank's shards are those of Megatron's own schedule. Encoders
that the ranks hold whole are run on a share of the pictures each."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bridge import equality
from tests.bridge.equality import Case, together
from tests.bridge.test_families import assert_equal, partitions
from tests.bridge.tiny import TINY
from tests.bridge.tiny_mcore import MCORE_TINY
from tests.processes import Team

SEED = 3
SPLIT = ("qwen3-vl", "qwen3-5-vl", "qwen3-5-vl-moe")
"""Whose encoder has Megatron's layers, split over the ranks."""


@pytest.fixture(scope="module")
def teams() -> Iterator[dict[bool, tuple[Team, Team]]]:
    """Of their own, as groups of Megatron's are made once; by whether for mcore-bridge, which changes Megatron."""
    made = {mcore: (Team(2), Team(4)) for mcore in (False, True)}
    yield made
    for one in (team for both in made.values() for team in both):
        one.close()


def dips(rank: int, world: int, case: Case) -> Any:
    """What equality.dips gives, and for each unit that this rank encoded how many of how many instances were its own; 0
    where it encoded one for nobody."""
    from dip_megatron.families.shared import sharing

    seen, of = [], sharing.UnitShare.of
    if case.tiny in MCORE_TINY:  # whose weights' ways in and out ms-swift's adapter changes
        from mcore_bridge.bridge.gpt_bridge import GPTBridge

        from dip_megatron.megatron.adapters.ms_swift import MsSwift

        GPTBridge.load_weights = MsSwift._load(GPTBridge.load_weights)
        GPTBridge.export_weights = MsSwift._export(GPTBridge.export_weights)

    def noted(tokens: Any, own: slice, *rest: Any) -> sharing.UnitShare:
        share = of(tokens, own, *rest)
        seen.append((share.instances[share.rank], own.stop - own.start))
        return share

    sharing.UnitShare.of = staticmethod(noted)  # type: ignore[method-assign,assignment]
    try:
        return equality.dips(rank, world, case), seen
    finally:
        sharing.UnitShare.of = staticmethod(of)  # type: ignore[method-assign]


def megatrons(rank: int, world: int, case: Case) -> Any:
    """What equality.megatrons gives. With sequence parallelism each rank adds what deepstack gives to its part of the
    sequence, and in the classes it has the gradient of that alone, of an encoder that all of them hold or share: here
    the ranks' are summed, or there is no sequence parallelism."""
    if case.tiny == "qwen3-omni":  # whose experts demand it
        from megatron.bridge.models.qwen_omni.modeling_qwen3_omni import thinker_model
        from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

        split = thinker_model.split_deepstack_embs

        def summed(where: Any, taps: list[torch.Tensor] | None, **how: Any) -> Any:
            return split(where, taps and [copy_to_tensor_model_parallel_region(tap) for tap in taps], **how)

        thinker_model.split_deepstack_embs = summed
        try:
            return equality.megatrons(rank, world, case)
        finally:
            thinker_model.split_deepstack_embs = split
    tapped = case.tiny in ("qwen3-vl", "mcore-qwen3-vl")
    return equality.megatrons(rank, world, replace(case, sequence=case.sequence and not tapped))


@pytest.mark.parametrize(("name", "cut", "sequence", "unit_size"), [
    ("qwen2-5-vl", "several", False, 1), ("qwen2-5-vl", "replicated", True, None), ("qwen3-vl", "several", True, 1),
    ("gemma3-vl", "several", True, None), ("ministral3-vl", "one", False, 2), ("qwen3-omni", "several", True, None),
    ("qwen2-5-omni", "several", True, 2), ("internvl", "several", False, 2), ("internvl-chat", "several", False, 2),
    ("mcore-qwen3-vl", "several", False, 1), ("mcore-qwen3-vl", "one", True, 2), ("kimi-vl", "several", True, 2),
    ("mcore-qwen3-5", "several", True, 2), ("mcore-glm-4-1v", "several", False, None),
    ("qwen3-5-vl-moe", "several", True, 1), ("qwen3-5-vl", "one", False, 2), ("glm-4-5v", "several", True, 1),
    ("kimi-k2-5", "several", True, 2), ("mcore-qwen3-5-moe-mtp", "several", True, 2),
    ("qwen2-vl", "several", False, 2),
])  # fmt: skip
def test_shards_train_as_the_class_does(
    name: str, cut: str, sequence: bool, unit_size: int | None, tmp_path: Path, teams: dict[bool, tuple[Team, Team]]
) -> None:
    if name in MCORE_TINY and importlib.util.find_spec("mcore_bridge") is None:
        pytest.skip("needs mcore-bridge")
    tiny = (TINY | MCORE_TINY)[name]
    tiny.save(tmp_path)
    case = Case(name, tmp_path, partitions(tiny)[cut], unit_size, seed=SEED, tensor=2, sequence=sequence)
    two, four = teams[name in MCORE_TINY]
    alone = two.run(megatrons, replace(case, layers={}))
    ran = four.run(dips, case)
    ranks = [found for found, _ in ran]
    for shard in range(2):
        assert_equal((ranks[2 + shard][0], together([ranks[stage + shard][1] for stage in (0, 2)])), alone[shard])
    for stage in (0, 2):
        units = list(zip(ran[stage][1], ran[stage + 1][1], strict=True))
        if name in SPLIT:
            assert not units
            continue
        assert units
        for (some, count), (others, _) in units:
            assert some + others == count
            assert count == 1 or (some and others)
