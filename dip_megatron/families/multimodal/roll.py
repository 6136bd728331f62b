"""Multimodal models of ROLL's ``mcore_adapter``: a GPTModel each, of which the first stage has Hugging Face's encoder
beside its embeddings, and merges its rows in by its own forward."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule

from ..shared.cut import found
from .grids import GivenRows, GridEncoder
from .model_spec import ModelSpec, drop

VISION_MODEL = "vision_model"
DEEPSTACK = "deepstack_visual_indexes"


class RollVision(GridEncoder):
    """Of pictures and videos. ``config_class`` is Hugging Face's, of which the model's config holds the values;
    ``first_matrix`` is where the model looks for the dtype of its encoder, within a block of it; ``packs``: it packs
    samples by itself."""

    called = VISION_MODEL
    config_class: ClassVar[type[Any]]
    first_matrix: ClassVar[tuple[str, str]]
    packs: ClassVar[bool] = False

    def config(self, config: Any) -> Any:
        return self.config_class(**config.vision_config)

    def settings(self, config: Any) -> Any:
        return self.config(config)

    def call(self, model: Any, hidden: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return rows_of(found(model, self.called)(hidden, grid_thw=grid))

    def lean(self, arguments: Mapping[str, Any], present: bool) -> dict[str, Any]:
        """Nor a picture of zeros for a microbatch that has none, of which the class adds nothing."""
        return super().lean(arguments, present) | {"force_vit_image": False, "force_vit_video": False}

    def entering(self, config: Any, arguments: Mapping[str, Any], embeddings: torch.Tensor) -> torch.Tensor:
        """With sequence parallelism each rank merges in what belongs to its part of the sequence, unless the class
        packs samples itself: it then merges everything in, and gives the ranks their parts afterwards."""
        whole = self.packs and arguments.get("packed_seq_params") is not None
        if not config.sequence_parallel or whole:
            return embeddings
        entered: torch.Tensor = copy_to_tensor_model_parallel_region(embeddings)
        return entered

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        mlp, matrix = self.first_matrix
        block = SimpleNamespace(**{mlp: SimpleNamespace(**{matrix: SimpleNamespace(weight=embeddings)})})
        return self.stands_in(embeddings, self.merged(config), blocks=[block])

    def stands_in(self, rows: torch.Tensor, merged: int, **known: Any) -> GivenRows:
        """In the encoder's place."""
        return GivenRows(rows, merged, **known)


def rows_of(output: Any) -> torch.Tensor:
    """Embeddings in what Hugging Face's encoder returns, in any release."""
    first = output[0] if isinstance(output, tuple) else getattr(output, "pooler_output", output)
    assert isinstance(first, torch.Tensor)
    return first


class RollSpec(ModelSpec):
    """``language_class`` is the class's language model, which it extends and builds first. The loop freezes parameters
    by itself, and plans follow what trains."""

    language = ""
    language_class: ClassVar[type[torch.nn.Module]]
    replicates = False  # the loop's export knows of one copy
    unsupported: ClassVar[Mapping[str, str]] = {
        **ModelSpec.unsupported,
        "decoder_input": "embeddings instead of tokens",
    }

    def tied(self, config: Any) -> bool:
        return bool(config.tie_embeddings_and_output_weights)

    def vocabulary(self, config: Any) -> int:
        return int(config.padded_vocab_size)

    def longest(self, config: Any) -> int:
        """The config says no more than what the model could take."""
        return min(int(config.max_sequence_length), 8192)

    def bare(self, kwargs: Mapping[str, Any]) -> Any:
        own = copy.copy(kwargs["config"])
        own.recompute_granularity = None  # plans say what is recomputed
        own.sequence_parallel = False  # the class has it of its encoder that each rank's gradient is a part of the sum
        kinds: tuple[Any, Any] = (self.model_class, self.language_class)
        return _encoders_of(*kinds)(own, vp_stage=None)

    def chunk(self, kwargs: Mapping[str, Any], config: Any, *, first: bool, last: bool, segment: int) -> Any:
        with _without_encoder_layers(config):  # what is built on the first chunk is thrown away
            model: Any = self.model_class(config, pre_process=first, post_process=last, vp_stage=segment)
        drop(model, first, VISION_MODEL)
        if first:  # which ranks have encoded what is known by then, and everything is here
            model.build_encoder_inputs = _all_of_them
            model.gather_encoder_outputs = _as_they_are
        return model


@cache
def _encoders_of(model_class: Any, language_class: Any) -> Any:
    """The class without its language model: between both in the order in which their constructors run stands one that
    doesn't go on."""

    class WithoutLanguage(language_class):  # type: ignore[misc]
        def __init__(self, config: Any, **_: Any):
            MegatronModule.__init__(self, config=config)
            self.pre_process, self.post_process, self.vp_stage = True, False, None

        def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            """Of the encoder alone."""
            return MegatronModule.sharded_state_dict(self, *args, **kwargs)

    return type(model_class.__name__, (model_class, WithoutLanguage), {})


@contextmanager
def _without_encoder_layers(config: Any) -> Iterator[None]:
    """Within, the config gives the encoder no layers, and none that feeds the language model's."""
    before = config.vision_config
    config.vision_config = {**before, "depth": 0} | ({DEEPSTACK: []} if DEEPSTACK in before else {})
    try:
        yield
    finally:
        config.vision_config = before


def _all_of_them(lengths: Any, features: Any, grids: Any, mask: Any = None) -> tuple[Any, ...]:
    """Instead of the model's own choice of what this rank encodes."""
    return None, features, grids, mask


def _as_they_are(rows: torch.Tensor, *_: Any) -> torch.Tensor:
    """Instead of the model's gathering of what ranks have encoded."""
    return rows


def packed_places(where: torch.Tensor, mask: torch.Tensor, packed: Any) -> torch.Tensor:
    """``where`` ``[b, s]`` as ``[1, all]``: what ``mask`` has of each sample, where its place in the row begins."""
    starts = packed.cu_seqlens_q_padded.tolist()
    row = where.new_zeros(1, starts[-1])
    for own, there, start in zip(where, mask.bool(), starts, strict=False):
        kept = own[there]
        row[0, start : start + len(kept)] = kept
    return row
