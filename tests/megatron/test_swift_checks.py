"""What DIP says of trainings of ms-swift's that it can't run. Needs no ms-swift."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dip_megatron.megatron.adapters.ms_swift import refusals

FITS = {
    "task_type": "causal_lm", "bridge_backend": "mcore-bridge", "pipeline_model_parallel_size": 2,
    "context_parallel_size": 2, "cp_partition_mode": "zigzag", "sequence_packing_scheduler": None,
    "use_megatron_fsdp": False, "tuner_type": "full", "freeze_parameters_ratio": 0.0,
    "mcore_model": None, "mcore_adapter": None, "target_modules": ["all-linear"], "modules_to_save": [],
}  # fmt: skip
UNFIT = {
    "task_type": "seq_cls", "bridge_backend": "megatron-bridge", "pipeline_model_parallel_size": 1,
    "cp_partition_mode": "contiguous", "sequence_packing_scheduler": "default_dynamic_cp",
    "use_megatron_fsdp": True, "freeze_parameters_ratio": 0.5,
    "mcore_model": "folder",
}  # fmt: skip


class MegatronTrainer:
    def __init__(self, **changes: Any):
        self.args = SimpleNamespace(**{**FITS, **changes})


class MegatronGRPOTrainer(MegatronTrainer):
    pass


def test_a_training_that_fits_is_not_refused() -> None:
    assert refusals(MegatronTrainer()) == []


@pytest.mark.parametrize("setting", UNFIT)
def test_one_that_does_not_is_refused_with_a_reason_and_a_way_out(setting: str) -> None:
    ((name, reason, way_out),) = refusals(MegatronTrainer(**{setting: UNFIT[setting]}))
    assert setting in name
    assert reason
    assert way_out


def test_trainers_that_call_models_by_themselves_are_refused() -> None:
    ((name, _, _),) = refusals(MegatronGRPOTrainer())
    assert name == "trainer MegatronGRPOTrainer"


@pytest.mark.parametrize("setting", ["all-embedding", "all-router"])
def test_adapters_are_for_linears(setting: str) -> None:
    assert refusals(MegatronTrainer(tuner_type="lora")) == []
    asked = {"tuner_type": "lora", "target_modules": ["all-linear", setting]}
    ((name, _, way_out),) = refusals(MegatronTrainer(**asked))
    assert setting in name
    assert "all-linear" in way_out


def test_other_layers_are_not_saved_beside_adapters() -> None:
    ((name, _, _),) = refusals(MegatronTrainer(tuner_type="lora", modules_to_save=["output_layer"]))
    assert "modules_to_save" in name
