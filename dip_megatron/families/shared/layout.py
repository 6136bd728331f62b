"""Any split of a module's layers over ranks and segments, told to Megatron through its own layout class."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig


class SegmentLayout(PipelineParallelLayerLayout):
    """The layers of one module, ``layers[segment][rank]``; its last chunk has ``mtp`` depths of multi-token prediction.

    Megatron's layout asks the global virtual pipeline size whether a ``vp_stage`` counts. Here each module has its own
    number of segments and the global one stays unset, so the two look-ups trust the ``vp_stage`` they are given.
    """

    def __init__(self, layers: tuple[tuple[int, ...], ...], rank: int, mtp: int = 0):
        flat = [[LayerType.decoder] * count for segment in layers for count in segment]
        flat[-1] += [LayerType.mtp] * mtp
        super().__init__(flat, len(layers[0]))
        self.layers = layers
        self.rank = rank
        self.mtp = mtp

    def get_num_layers_to_build(
        self, layer_type: Any = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        """Number of layers of the chunk (``vp_stage`` = segment)."""
        place = (vp_stage or 0, self.rank if pp_rank is None else pp_rank)
        if layer_type == LayerType.mtp:
            return self.mtp if place == (len(self.layers) - 1, len(self.layers[0]) - 1) else 0
        return self.layers[place[0]][place[1]] if layer_type == LayerType.decoder else 0

    def get_layer_offset(
        self, layer_type: Any = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        """Number of the module's layers before the chunk."""
        if layer_type != LayerType.decoder:
            return 0
        segment, rank = vp_stage or 0, self.rank if pp_rank is None else pp_rank
        return sum(sum(line) for line in self.layers[:segment]) + sum(self.layers[segment][:rank])


def segment_config(config: TransformerConfig, layers: tuple[tuple[int, ...], ...], rank: int) -> TransformerConfig:
    """A copy of a module's config for building its chunk on ``rank``: its own number of segments and its own layout."""
    ranks = len(layers[0])
    built = copy.copy(config)
    built.num_layers = sum(sum(line) for line in layers)
    built.pipeline_model_parallel_size = ranks
    built.virtual_pipeline_model_parallel_size = len(layers) if len(layers) > 1 else None
    built.num_layers_in_first_pipeline_stage = None
    built.num_layers_in_last_pipeline_stage = None
    built.account_for_embedding_in_pipeline_split = False
    built.account_for_loss_in_pipeline_split = False
    built.pipeline_model_parallel_layout = SegmentLayout(layers, rank, getattr(config, "mtp_num_layers", None) or 0)
    return order_free(built)


def without_layout(config: TransformerConfig) -> TransformerConfig:
    """A copy of a chunk's config that says nothing of where layers stand."""
    whole = copy.copy(config)
    whole.pipeline_model_parallel_layout = None
    return whole


def order_free(config: TransformerConfig) -> TransformerConfig:
    """A copy for layers whose backwards come in any order.

    Transformer Engine lets the microbatch whose forward came first write its weight gradient instead of adding it,
    which is right only if its backward is first too. Told to keep no FP8 copies of weights between microbatches, it
    always adds.
    """
    built = copy.copy(config)
    built.disable_parameter_transpose_cache = True
    return built


class PinnedLayout(SegmentLayout):
    """That of one chunk, for models that don't hand ``vp_stage`` on to what asks."""

    def __init__(self, layout: SegmentLayout, segment: int):
        super().__init__(layout.layers, layout.rank)
        self._segment = segment

    def get_num_layers_to_build(
        self, layer_type: Any = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        """Number of layers of the chunk."""
        return super().get_num_layers_to_build(layer_type, self._segment, pp_rank)

    def get_layer_offset(
        self, layer_type: Any = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        """Number of the module's layers before the chunk."""
        return super().get_layer_offset(layer_type, self._segment, pp_rank)


def pinned(config: TransformerConfig, segment: int) -> TransformerConfig:
    """A copy of a :func:`segment_config` for the chunk of that segment, whatever ``vp_stage`` is asked for."""
    built = copy.copy(config)
    built.virtual_pipeline_model_parallel_size = None
    built.pipeline_model_parallel_layout = PinnedLayout(config.pipeline_model_parallel_layout, segment)
    return built
