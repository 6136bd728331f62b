"""What DIP says of models of verl's engine that it can't run. Needs no verl."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dip_megatron.megatron.adapters.verl import refusals

WRAP = {"is_value_model": False, "use_megatron_fsdp": False, "use_layer_wise_distributed_optimizer": False}
PROVIDER = {"pipeline_model_parallel_size": 2, "context_parallel_size": 1}


def said(peft: Any = None, **changes: Any) -> list[tuple[str, str, str]]:
    wrap, provider = ({k: changes.get(k, v) for k, v in given.items()} for given in (WRAP, PROVIDER))
    return refusals(SimpleNamespace(**wrap), SimpleNamespace(**provider), peft)


def test_a_model_that_fits_is_not_refused() -> None:
    assert said() == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"is_value_model": True}, "a value model"),
        ({"use_megatron_fsdp": True}, "use_megatron_fsdp"),
        ({"use_layer_wise_distributed_optimizer": True}, "the layer-wise optimizer"),
        ({"pipeline_model_parallel_size": 1}, "pipeline_model_parallel_size 1"),
        ({"context_parallel_size": 2}, "context_parallel_size 2"),
        ({"peft": object()}, "adapters"),
    ],
)
def test_one_that_does_not_is_refused_with_a_reason_and_a_way_out(changes: dict[str, Any], named: str) -> None:
    ((setting, reason, way_out),) = said(**changes)
    assert setting == named
    assert reason
    assert way_out


def test_models_of_mbridge_are_refused() -> None:
    ((setting, _, _),) = refusals(SimpleNamespace(**WRAP), None, None)
    assert setting == "vanilla_mbridge"
