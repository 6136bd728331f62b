"""Encoders of pictures of which some layers also feed the language model's first layers (deepstack)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.utils import split_deepstack_embs

from ...compat.bridge_building import add_deepstack
from ...describe.model import ModuleShape, PatchEmbedding, Projector, TransformerLayer
from ..describe import trainable_parts
from .grids import GridEncoder


class DeepstackVision(GridEncoder):
    """A vision transformer as Qwen3-VL's, whoever's layers it has."""

    def tapped(self, config: Any) -> tuple[int, ...]:
        """Numbers of the layers that feed the language model."""
        return tuple(getattr(self.config(config), "deepstack_visual_indexes", ()))

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        vision = self.config(config)
        merge, heads = vision.spatial_merge_size, vision.num_heads
        sees = not freeze.get("freeze_vision_model")
        return ModuleShape(
            self.name, self.kind, vision.depth,
            TransformerLayer(vision.hidden_size, vision.intermediate_size, heads, heads),
            PatchEmbedding(vision.patch_size, vision.in_channels, vision.temporal_patch_size),
            Projector(config.hidden_size, vision.hidden_size * merge**2, merge**2),
            trainable=trainable_parts(stem=sees, layers=sees, head=not freeze.get("freeze_vision_projection")),
            taps=self.tapped(config),
        )  # fmt: skip


def add_to_layer(model: Any, hidden: torch.Tensor, where: torch.Tensor, tap: torch.Tensor) -> torch.Tensor:
    """See :meth:`.page.Page.add_tap`; ``model`` has Bridge's language model and its process groups."""
    tensor, context = model.pg_collection.tp, model.pg_collection.cp
    if model.config.sequence_parallel or context.size() > 1:
        where, (tap,) = split_deepstack_embs(
            where, [tap], tp_size=tensor.size(), tp_rank=tensor.rank(), cp_size=context.size(),
            cp_rank=context.rank(), sequence_parallel=model.config.sequence_parallel,
        )  # fmt: skip
    return add_deepstack(model.language_model.decoder, hidden, where, tap)
