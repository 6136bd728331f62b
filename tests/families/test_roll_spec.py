"""How models of ROLL's ``mcore_adapter`` are built in parts, on a class of the same kind. Needs no ROLL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from dip_megatron.families.multimodal.roll import RollSpec, RollVision, packed_places, rows_of


class Language(MegatronModule):
    def __init__(self, config: Any, *, pre_process: bool, post_process: bool, vp_stage: int):
        super().__init__(config)
        self.pre_process, self.vp_stage = pre_process, vp_stage
        self.decoder = torch.nn.Linear(2, 2)


class Model(Language):
    """As ROLL's: its language model, then an encoder on the first stage, which some of its layers want whole."""

    def __init__(self, config: Any, **given: Any):
        super().__init__(config, **given)
        taken = config.vision_config["deepstack_visual_indexes"]
        assert not (self.vp_stage == 0 and taken), "the stage has fewer layers than the encoder feeds"
        if self.pre_process:
            self.vision_model = torch.nn.Sequential(
                *[torch.nn.Linear(2, 2) for _ in range(config.vision_config["depth"])]
            )
            for parameter in self.vision_model.parameters():
                parameter.sequence_parallel = config.sequence_parallel
            self.recomputes = config.recompute_granularity == "full"

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return input_ids

    def build_encoder_inputs(self, *_: Any) -> None:
        raise AssertionError("each rank would encode a part")

    gather_encoder_outputs = build_encoder_inputs


class ModelPage(RollSpec):
    name = "model"
    model_class = Model
    language_class = Language
    encoders = ()


@pytest.fixture
def config() -> Any:
    made: Any = TransformerConfig(num_layers=2, hidden_size=4, num_attention_heads=1)
    made.vision_config = {"depth": 3, "deepstack_visual_indexes": [0, 1]}
    made.sequence_parallel, made.recompute_granularity = True, "full"
    return made


def test_the_encoder_is_built_by_the_class_without_its_language_model(config: Any) -> None:
    made = ModelPage().bare({"config": config})
    assert isinstance(made, Model)
    assert type(made).__name__ == "Model"
    assert {name.partition(".")[0] for name, _ in made.named_parameters()} == {"vision_model"}
    assert len(made.vision_model) == 3
    assert not made.recomputes
    assert not any(parameter.sequence_parallel for parameter in made.parameters())
    assert (config.sequence_parallel, config.recompute_granularity) == (True, "full")


def test_a_chunk_of_the_language_model_has_no_encoder_and_encodes_nothing(config: Any) -> None:
    before = config.vision_config
    made = ModelPage().chunk({"config": config}, config, first=True, last=False, segment=0)
    assert {name.partition(".")[0] for name, _ in made.named_parameters()} == {"decoder"}
    assert config.vision_config is before
    grids = torch.ones(2, 3)
    assert made.build_encoder_inputs([4, 4], "pixels", grids, None) == (None, "pixels", grids, None)
    assert made.gather_encoder_outputs(grids, None, [1, 1]) is grids
    later = ModelPage().chunk({"config": config}, config, first=False, last=True, segment=1)
    assert "build_encoder_inputs" not in vars(later)


def test_no_picture_of_zeros_is_asked_for() -> None:
    lean = RollVision.lean(_Encoder(), {"pixel_values": torch.ones(8, 6), "force_vit_image": True}, False)
    assert lean == {"pixel_values": None, "force_vit_image": False, "force_vit_video": False}


class _Encoder(RollVision):
    def points(self, config: Any) -> Any: ...

    def hidden(self, config: Any) -> Any: ...

    def describe(self, config: Any, freeze: Any) -> Any: ...


class Output:
    pooler_output = torch.ones(2, 4)


@pytest.mark.parametrize("output", [Output(), Output.pooler_output, (Output.pooler_output, [])])
def test_embeddings_are_found_in_what_any_release_returns(output: Any) -> None:
    assert rows_of(output) is Output.pooler_output


def test_places_of_samples_in_rows_are_those_of_the_packed_row() -> None:
    """The first sample is padded before its begin, the second behind its end; each place in the row is a multiple of
    four."""
    where = torch.tensor([[True, False, True, False, True], [True, True, False, True, True]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    ends = torch.tensor([0, 4, 8], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_q_padded=ends)
    expected = torch.tensor([[True, False, True, False, True, True, False, False]])
    assert torch.equal(packed_places(where, mask, packed), expected)
