"""What DIP says of ROLL's strategies that it can't run, and which chunk it tells ROLL has a weight. Needs no ROLL."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dip_megatron.compat.mcore_adapter import chunks_of, follow, mark
from dip_megatron.describe.files import ConfigurationError
from dip_megatron.megatron.adapters.roll import PARTITION, check_partition, refusals, take_layout

ARGS = {
    "pipeline_model_parallel_size": 2, "context_parallel_size": None, "expert_model_parallel_size": None,
    "compile_warmup": False,
}  # fmt: skip


def said(lora: Any = None, replay: bool = False, **changes: Any) -> list[tuple[str, str, str]]:
    worker = SimpleNamespace(model_args=SimpleNamespace(lora_target=lora))
    args = SimpleNamespace(**ARGS | changes)
    return refusals(
        SimpleNamespace(megatron_train_args=args, worker_config=worker, enable_router_replay=replay)
    )  # fmt: skip


def test_a_strategy_that_fits_is_not_refused() -> None:
    assert said() == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pipeline_model_parallel_size": 1}, "pipeline_model_parallel_size 1"),
        ({"pipeline_model_parallel_size": None}, "pipeline_model_parallel_size 1"),
        ({"context_parallel_size": 2}, "context_parallel_size 2"),
        ({"compile_warmup": True}, "compile_warmup"),
        ({"replay": True}, "router_replay"),
        ({"lora": ["all-linear"]}, "lora_target"),
    ],
)
def test_one_that_does_not_is_refused_with_a_reason_and_a_way_out(changes: dict[str, Any], named: str) -> None:
    ((setting, reason, way_out),) = said(**changes)
    assert setting == named
    assert reason
    assert way_out


def test_a_layout_is_taken() -> None:
    given = {
        "virtual_pipeline_model_parallel_size": None, "pipeline_model_parallel_layout": "Et|tL",
        "num_layers_in_first_pipeline_stage": 3, "account_for_loss_in_pipeline_split": True,
        "account_for_embedding_in_pipeline_split": False,
    }  # fmt: skip
    config = SimpleNamespace(**given)
    assert str(take_layout(config)) == (
        "pipeline_model_parallel_layout, num_layers_in_first_pipeline_stage, account_for_loss_in_pipeline_split"
    )
    assert config.pipeline_model_parallel_layout is config.num_layers_in_first_pipeline_stage is None
    assert config.account_for_loss_in_pipeline_split is False
    assert take_layout(SimpleNamespace()) is None


LAYERS = {"vision": ((1, 2),), "language": ((1, 2), (2, 1))}


def written(folder: Path) -> Path:
    (folder / PARTITION).write_text(json.dumps(LAYERS))
    return folder


def test_a_checkpoint_is_loaded_into_the_chunks_that_wrote_it(tmp_path: Path) -> None:
    check_partition(tmp_path, None)  # neither is DIP's
    check_partition(written(tmp_path), LAYERS)


@pytest.mark.parametrize("here", [None, LAYERS | {"language": ((1, 1), (2, 2))}])
def test_other_chunks_are_told_those_that_wrote_it(tmp_path: Path, here: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"DIP_MODULES='\{\"vision\": \{\"layers\": \[\[1, 2\]\]\}"):
        check_partition(written(tmp_path), here)


def test_stages_of_a_run_without_dip_are_no_chunks(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="was written without DIP"):
        check_partition(tmp_path, LAYERS)


class Chunk:
    def __init__(self, *names: str):
        self.config, self._names = SimpleNamespace(), names

    def state_dict(self) -> dict[str, int]:
        return dict.fromkeys(self._names, 0)


class Converter:
    """As ROLL's: of stages with equally many layers."""

    virtual_pipeline_model_parallel_rank = 0

    def __init__(self, config: Any, rank: int, revert: bool = False):
        follow(self, config)
        self.mca_config, self.rank, self.revert = config, rank, revert
        self.each = self._get_num_layers_per_virtual_rank()

    def _get_num_layers_per_virtual_rank(self) -> int | None:
        return 2

    def is_pipeline_first_stage(self, vp_stage: int) -> bool:
        return self.rank == vp_stage == 0

    def is_pipeline_last_stage(self, vp_stage: int) -> bool:
        return self.rank == 1 and vp_stage == 0

    def _get_layer_info(self, layer: int) -> tuple[int, int, int]:
        return layer % 2, layer // 2, 0

    def get_global_layer_index(self, local: int, vp_stage: int) -> int:
        return local + 2 * self.rank

    def is_on_this_rank(self, name: str, vp_stage: int | None = None) -> bool:
        stage = 0 if vp_stage is None else vp_stage
        if name.startswith("vision_model") or name.startswith("embedding"):
            return self.is_pipeline_first_stage(stage)
        if name.startswith("output"):
            return self.is_pipeline_last_stage(stage)
        return self._get_layer_info(int(name.split(".")[1]))[1:] == (self.rank, stage)


NAMES = ["vision_model.stem", "vision_model.blocks.0", "vision_model.blocks.1", "vision_model.blocks.2", "embedding",
         *(f"layers.{i}" for i in range(6)), "output"]  # fmt: skip
HELD = {
    0: [NAMES[:2], ["embedding", "layers.0"], ["layers.3", "layers.4"]],
    1: [NAMES[2:4], ["layers.1", "layers.2"], ["layers.5", "output"]],
}
"""Of each rank's chunks: the first is the encoder's."""


@pytest.mark.parametrize("rank", [0, 1])
def test_each_chunk_is_given_its_own_weights_alone(rank: int) -> None:
    config = SimpleNamespace()
    chunks = [Chunk(*names) for names in HELD[rank]]
    mark(config, chunks, LAYERS["language"], rank)
    for own in (config, *(chunk.config for chunk in chunks)):
        converter = Converter(own, rank)
        assert converter.each is None
        found = [[name for name in NAMES if converter.is_on_this_rank(name, vp_stage=i)] for i in range(3)]
        assert found == HELD[rank]
        assert [converter.is_on_this_rank("vision_model.blocks.{}", vp_stage=i) for i in range(3)] == [
            True,
            False,
            False,
        ]
    assert chunks_of(chunks[0].config).whole is config  # type: ignore[union-attr]


def test_layers_have_their_numbers_of_the_whole_model_on_the_way_out() -> None:
    for rank, numbers in ((0, {1: [0], 2: [3, 4]}), (1, {1: [1, 2], 2: [5]})):
        config = SimpleNamespace()
        mark(config, [Chunk(*names) for names in HELD[rank]], LAYERS["language"], rank)
        converter = Converter(config, rank, revert=True)
        for chunk, own in numbers.items():
            assert [converter.get_global_layer_index(i, chunk) for i in range(len(own))] == own
            assert [converter._get_layer_info(layer) for layer in own] == [(i, rank, chunk) for i in range(len(own))]
        assert converter.is_on_this_rank("anything", vp_stage=0)


def test_a_model_without_chunks_is_converted_as_ever() -> None:
    converter = Converter(SimpleNamespace(), 1)
    assert type(converter) is Converter
    assert converter.each == 2
    assert converter.is_on_this_rank("layers.3", vp_stage=0)
