"""What the configuration says of some modules holds, whatever is left to the partitioner or comes from a checkpoint."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dip_megatron.config import DipConfig
from dip_megatron.describe.files import ConfigurationError
from dip_megatron.describe.model import Partition, even_partition, load_model
from dip_megatron.planner.partitioning import Given

VLM = load_model("vlm-s")
EVEN = even_partition(VLM).module("vision").layers


def configuration(**modules: Any) -> DipConfig:
    return DipConfig(schedule="dynamic", modules=modules)


def test_each_module_has_what_is_said_of_it() -> None:
    from dip_megatron.megatron.build import given_parts

    assert given_parts(VLM, configuration()) == {}
    assert given_parts(VLM, configuration(vision={"placement": "segmented"})) == {}
    assert given_parts(VLM, configuration(vision={"segments": 1, "unit_size": 12})) == {"vision": Given(EVEN, 12, True)}
    assert given_parts(VLM, configuration(vision={"unit_size": None})) == {"vision": Given(None, None, True)}
    with pytest.raises(ConfigurationError, match=r"^--dip-config: modules.vision.layers: add up to 4, the model has "):
        given_parts(VLM, configuration(vision={"layers": [[1, 1, 1, 1]]}))


def chunks(config: DipConfig, saved: Partition) -> Partition | str:
    """What a run holds that goes on from a checkpoint of ``saved``; "searched": the partitioner is asked."""
    from dip_megatron.megatron.chunks import ChunkChoice

    class Choice(ChunkChoice):
        def _chosen(self, *_: Any) -> Any:
            return Partition(())

    choice = Choice(
        SimpleNamespace(layout=None), config, SimpleNamespace(mixed=None, name="dip"), None, lambda _: None  # type: ignore[arg-type]
    )  # fmt: skip
    checkpoint: Any = SimpleNamespace(partition_for=lambda _: saved)
    found = choice.chunks(VLM, None, None, None, checkpoint)  # type: ignore[arg-type]
    assert isinstance(found, Partition)
    return found if found.modules else "searched"


def test_a_checkpoints_partition_gives_way_to_what_is_said() -> None:
    saved = even_partition(VLM, {"language": 2}, {"vision": 4})
    assert chunks(configuration(), saved) == saved
    sized = chunks(configuration(vision={"unit_size": 9}), saved)
    assert sized == even_partition(VLM, {"language": 2}, {"vision": 9})
    assert chunks(configuration(vision={"segments": 1}), saved) == saved
    assert chunks(configuration(vision={"segments": 2}), saved) == "searched"
