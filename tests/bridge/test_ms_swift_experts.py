"""Experts of mcore-bridge's models in ms-swift's own trainer, spread over two replicas of two stages: the same numbers
without DIP and under its joint plans. Of one family in each run of the tests, of all in a deep one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bridge.test_ms_swift import DIP, TAPPED, assert_trained_alike, pytestmark, ran  # noqa: F401
from tests.bridge.tiny_mcore import MCORE_TINY
from tests.drawn import DEEP

SPREAD = {
    "stages": 2, "expert_model_parallel_size": 2, "micro_batch_size": 2, "moe_aux_loss_coeff": [0.01],
}  # fmt: skip
"""Two samples packed in a row; encoders frozen, as ms-swift has it unless it is told otherwise."""
RUNS = {"whole": {**SPREAD, "freeze_vit": False, "freeze_aligner": False}}
FAMILIES = ["mcore-qwen3-vl-moe"]
if DEEP:
    RUNS["frozen"] = SPREAD
    FAMILIES += ["mcore-glm-4-5v", "mcore-qwen3-5-moe", "internvl-moe", "kimi-vl"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folders: Path = tmp_path_factory.mktemp("folders")
    asked: dict[str, dict[str, Any]] = {}
    for name in FAMILIES:
        MCORE_TINY[name].save(folders / name)
        dip = TAPPED if MCORE_TINY[name].language_layers == 6 else DIP
        for how, given in RUNS.items():
            asked[f"{name}-{how}"] = {**given, "tiny": name}
            asked[f"{name}-{how}-dip"] = {**given, "tiny": name, "dip": dip}
    return ran(asked, folders, tmp_path_factory.mktemp("swift"), ranks=4)


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("name", FAMILIES)
def test_replicas_that_share_experts_train_as_without_dip(runs: Any, name: str, how: str) -> None:
    """Each replica's ranks have half of the experts, and all of the rest."""
    under, off = runs[f"{name}-{how}-dip"], runs[f"{name}-{how}"]
    assert any("experts" in gradient and "weight1" in gradient for gradient in off[0]["gradients"])
    assert not any("experts" in gradient and "weight2" in gradient for gradient in off[0]["gradients"])
    for replica in (0, 1):
        assert_trained_alike(under[replica::2], off[replica::2], weights=1e-4)
