"""ROLL's ``mcore_adapter``: which chunk has which weights, on their ways in from Hugging Face's files and out again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from .names import Name, Topic

_CONVERTER = "mcore_adapter.models.converter.dist_converter:DistConverter"
_FACTORY = "mcore_adapter.models.model_factory"
TOPIC = Topic(
    "models of mcore_adapter",
    "mcore-adapter",
    "0.10.0.dev0",
    "ROLL's multimodal models can't be trained under DIP",
    (
        Name(f"{_FACTORY}:VirtualModels.__init__", ("cls", "config")),
        Name(f"{_FACTORY}:McaGPTModel"),
        Name(f"{_CONVERTER}.is_on_this_rank", ("weight_name", "*", "vp_stage")),
        Name(f"{_CONVERTER}.is_pipeline_first_stage", ("*", "vp_stage")),
        Name(f"{_CONVERTER}.is_pipeline_last_stage", ("*", "vp_stage")),
        Name(f"{_CONVERTER}.get_global_layer_index", ("local_layer_index", "*", "vp_stage")),
        Name(f"{_CONVERTER}._get_layer_info", ("global_layer_index",)),
        Name(f"{_CONVERTER}._get_num_layers_per_virtual_rank", ()),
        Name("mcore_adapter.models.model_config:PretrainedConfig.save_pretrained", ("save_directory",)),
        Name(
            "mcore_adapter.models.qwen2_5_vl:Qwen2_5_VLModel.forward",
            ("input_ids", "*", "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"),
        ),
        Name("mcore_adapter.models.qwen2_vl:Qwen2VLModel", has=("build_encoder_inputs", "gather_encoder_outputs")),
        Name("mcore_adapter.models.qwen2_5_vl:Qwen2_5_VLModel", has=("build_encoder_inputs", "gather_encoder_outputs")),
        Name(
            "mcore_adapter.models.qwen3_vl:Qwen3VLModel.forward",
            ("input_ids", "*", "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"),
        ),
        Name(
            "mcore_adapter.models.qwen3_vl:Qwen3VLModel",
            has=("build_encoder_inputs", "gather_encoder_outputs", "merge_deepstack_embeds"),
        ),
        Name("mcore_adapter.models.qwen3_vl.modeling_qwen3_vl:Qwen3VLGPTModel", has=("decoder",)),
    ),
)
_MARK = "dip_chunks"
"""An attribute of the configs of chunks, and of the whole model's."""


@dataclass(frozen=True)
class Chunks:
    """A pipeline rank's: first those of encoders, of each the names of its weights; then the language model's, of which
    ``layers`` are ``[segment][rank]``. ``whole`` is the config that the loop has made of the model."""

    encoders: tuple[frozenset[str], ...]
    layers: tuple[tuple[int, ...], ...]
    rank: int
    whole: Any

    def has(self, name: str, chunk: int) -> bool | None:
        """Whether an encoder's weight is in that chunk, of several in whose names ``{}`` stands for what differs one;
        None for what the language model may have in one of its."""
        if chunk < len(self.encoders):
            own, (start, some, _) = self.encoders[chunk], name.partition("{}")
            return any(held.startswith(start) for held in own) if some else name in own
        return False if _of_encoder(name) else None

    def first(self, chunk: int) -> bool:
        """Whether the language model begins with it."""
        return (chunk - len(self.encoders), self.rank) == (0, 0)

    def last(self, chunk: int) -> bool:
        """Whether the language model ends with it."""
        return (chunk - len(self.encoders), self.rank) == (len(self.layers) - 1, len(self.layers[0]) - 1)

    def before(self, chunk: int) -> int:
        """How many of the language model's layers come before it."""
        segment = chunk - len(self.encoders)
        return sum(map(sum, self.layers[:segment])) + sum(self.layers[segment][: self.rank])

    def place(self, layer: int) -> tuple[int, int, int]:
        """The number of a layer within its chunk, its rank, and its chunk."""
        for segment, line in enumerate(self.layers):
            for rank, count in enumerate(line):
                if layer < count:
                    return layer, rank, segment + len(self.encoders)
                layer -= count
        raise ValueError(f"the language model has {sum(map(sum, self.layers))} layers")


def mark(config: Any, chunks: Sequence[Any], layers: tuple[tuple[int, ...], ...], rank: int) -> None:
    """Let converters of weights know of ``chunks``, of which the last are the language model's; ``config`` is the whole
    model's."""
    encoders = chunks[: len(chunks) - len(layers)]
    told = Chunks(tuple(frozenset(chunk.state_dict()) for chunk in encoders), layers, rank, config)
    for own in (config, *(chunk.config for chunk in chunks)):
        setattr(own, _MARK, told)


def chunks_of(config: Any) -> Chunks | None:
    """What a config has been told of chunks."""
    found: Chunks | None = getattr(config, _MARK, None)
    return found


def follow(converter: Any, config: Any) -> None:
    """Let ``converter``, which is about to be made for ``config``, find weights in the chunks, if it is of some."""
    if chunks_of(config) is not None:
        kind: Any = type(converter)
        converter.__class__ = _of_chunks(kind)


@cache
def _of_chunks(kind: Any) -> Any:
    class OfChunks(kind):  # type: ignore[misc]
        @property
        def _chunks(self) -> Chunks:
            found = chunks_of(self.mca_config)
            assert found is not None
            return found

        def is_on_this_rank(self, weight_name: str, vp_stage: int | None = None) -> bool:
            if self.revert:
                return True
            chunk = self.virtual_pipeline_model_parallel_rank if vp_stage is None else vp_stage
            found = self._chunks.has(weight_name, chunk)
            return bool(super().is_on_this_rank(weight_name, chunk) if found is None else found)

        def is_pipeline_first_stage(self, vp_stage: int) -> bool:
            return self._chunks.first(vp_stage)

        def is_pipeline_last_stage(self, vp_stage: int) -> bool:
            return self._chunks.last(vp_stage)

        def get_global_layer_index(self, local_layer_index: int, vp_stage: int) -> int:
            return self._chunks.before(vp_stage) + local_layer_index

        def _get_layer_info(self, global_layer_index: int) -> tuple[int, int, int]:
            return self._chunks.place(global_layer_index)

        def _get_num_layers_per_virtual_rank(self) -> None:
            """Chunks have any number."""

    OfChunks.__name__ = kind.__name__
    return OfChunks


def _of_encoder(name: str) -> bool:
    return name.startswith(("vision_model.", "audio_model."))
