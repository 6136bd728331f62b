"""Modules that stand whole on every rank, as the configuration asks for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dip_megatron.config import DipConfig
from dip_megatron.describe.files import ConfigurationError
from dip_megatron.describe.model import load_model

VLM = load_model("vlm-s")


def family(replicates: bool) -> Any:
    from dip_megatron.families.known import known_families

    return replace(known_families()[0], replicates=replicates)


def configuration(**modules: Any) -> DipConfig:
    return DipConfig(schedule="dynamic", modules=modules)


def test_a_replicated_module_has_all_layers_on_every_rank() -> None:
    from dip_megatron.megatron.build import check_placement, configured_partition

    config = configuration(vision={"placement": "replicated", "unit_size": 2}, language={"segments": 1})
    check_placement(VLM, config, family(True))
    partition = configured_partition(VLM, config)
    assert partition is not None
    vision = partition.module("vision")
    assert (vision.replicated, vision.layers, vision.unit_size) == (True, ((VLM.module("vision").layers,) * 4,), 2)
    assert "on every rank" in partition.explain()


@pytest.mark.parametrize(("modules", "replicates", "reason"), [
    ({"vision": {"placement": "replicated", "segments": 1}}, True, "leave out layers and segments"),
    ({"language": {"placement": "replicated"}}, True, "only encoders"),
    ({"vision": {"placement": "replicated"}}, False, "can't be built so"),
], ids=["layers", "language", "family"])  # fmt: skip
def test_what_cannot_stand_so_is_refused_in_one_line(modules: Any, replicates: bool, reason: str) -> None:
    from dip_megatron.megatron.build import check_placement

    with pytest.raises(ConfigurationError) as refused:
        check_placement(VLM, configuration(**modules), family(replicates))
    assert reason in str(refused.value)
    assert str(refused.value).startswith(f"--dip-config: modules.{next(iter(modules))}.placement: replicated: ")


def test_the_partitioner_is_told_what_it_may_do() -> None:
    from dip_megatron.megatron.build import placements

    assert placements(VLM, configuration(), family(True)) == {"vision": "either"}
    asked = configuration(vision={"placement": "segmented"})
    assert placements(VLM, asked, family(True)) == {"vision": "segmented"}
    assert placements(VLM, configuration(), family(False)) == {}
