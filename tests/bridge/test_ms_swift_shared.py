"""mcore-bridge's models in ms-swift's own trainer on two stages of two ranks, which are two replicas that spread the
experts of each layer over both, or share each sequence: the same numbers without DIP and under it. Of one family in
each run of the tests, of all in a deep one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.bridge.test_ms_swift import DIP, TAPPED, assert_trained_alike, pytestmark, ran  # noqa: F401
from tests.bridge.tiny_mcore import MCORE_TINY
from tests.drawn import DEEP

ROWS = {"stages": 2, "micro_batch_size": 2}
"""Two samples packed in each; encoders frozen, as ms-swift has it unless it is told otherwise."""
WHOLE = {**ROWS, "freeze_vit": False, "freeze_aligner": False}
EXPERTS = {"expert_model_parallel_size": 2, "moe_aux_loss_coeff": [0.01]}
BALANCED = {"moe_router_load_balancing_type": ["global_aux_loss"], "moe_aux_loss_coeff": [0.01]}
"""Over all replicas, each of which has all experts."""
IN_ORDER = {"DIP_SCHEDULE": "static", "DIP_SEARCH_EVALUATIONS": "1"}
"""Microbatches as they come, from the first plan on: running means are those of Megatron's own schedule then."""
SHARES = {"context_parallel_size": 2}
FAMILIES = ["mcore-qwen3-vl-moe"]
DENSE: list[str] = []
if DEEP:
    FAMILIES += ["mcore-glm-4-5v", "mcore-qwen3-5-moe", "internvl-moe", "kimi-vl"]
    DENSE += ["qwen2-vl", "mcore-qwen3-vl", "mcore-glm-4-1v", "mcore-qwen3-5", "internvl", "internvl-chat"]
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "experts": {name: {**WHOLE, **EXPERTS, "tiny": name} for name in FAMILIES}
}
"""By how ranks share: processes keep the groups of their first training."""
if DEEP:
    CASES["experts"] |= {f"{name} frozen": {**ROWS, **EXPERTS, "tiny": name} for name in FAMILIES}
    CASES["sequences"] = {name: {**WHOLE, **SHARES, **EXPERTS, "tiny": name} for name in FAMILIES}
    CASES["sequences"] |= {f"{name} frozen": {**ROWS, **SHARES, **EXPERTS, "tiny": name} for name in FAMILIES}
    CASES["balance"] = {"mcore-qwen3-vl-moe": {**WHOLE, **BALANCED, "tiny": "mcore-qwen3-vl-moe"}}
    CASES["dense sequences"] = {name: {**WHOLE, **SHARES, "tiny": name} for name in DENSE}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, list[Any]]]:
    """Those of processes that share so."""
    folders: Path = tmp_path_factory.mktemp("folders")

    @cache
    def trained(how: str) -> dict[str, list[Any]]:
        asked: dict[str, dict[str, Any]] = {}
        for case, given in CASES[how].items():
            tiny = MCORE_TINY[given["tiny"]]
            if not (folders / tiny.name).exists():
                tiny.save(folders / tiny.name)
            asked[case] = given
            dip = TAPPED if tiny.language_layers == 6 else DIP
            asked[f"{case} dip"] = {**given, "dip": dip | (IN_ORDER if how == "balance" else {})}
        return ran(asked, folders, tmp_path_factory.mktemp(how.replace(" ", "_")), ranks=4)

    return trained


@pytest.mark.parametrize(("how", "case"), [(how, case) for how, cases in CASES.items() for case in cases])
def test_two_ranks_of_a_stage_train_as_without_dip(runs: Any, how: str, case: str) -> None:
    """Where there are experts, each rank has half of them, and all of the rest; where only their balance joins
    replicas, all."""
    under, off = runs(how)[f"{case} dip"], runs(how)[case]
    experts = {name for name in off[0]["gradients"] if "experts" in name and name[-1].isdigit()}
    here = "0123" if how == "balance" else "01" if case.split()[0] in FAMILIES else ""
    assert {name[-1] for name in experts} == set(here)
    for rank in (0, 1):
        assert_trained_alike(under[rank::2], off[rank::2], weights=1e-4)
