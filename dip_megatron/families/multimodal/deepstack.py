"""Encoders of pictures of which some layers also feed the language model's first layers (deepstack)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

from ...describe.model import ModuleShape, PatchEmbedding, Projector, TransformerLayer
from ..describe import trainable_parts
from ..shared.cut import CutPoints
from ..shared.shards import shard_rows
from .grids import GridEncoder
from .model_spec import Arguments
from .shapes import HiddenShape


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


class _Positions(torch.nn.Module):
    """In the place of the table of positions on chunks after the first: nothing to add."""

    def __init__(self, whole: torch.nn.Module):
        super().__init__()

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*indices.shape, 1, device=indices.device)


class HuggingFaceVision(DeepstackVision):
    """Hugging Face's: ``mergers`` is its list of what brings the tapped layers' outputs to the language model's width.
    Instances are images, then videos."""

    mergers: ClassVar[str] = "deepstack_merger_list"

    def points(self, config: Any) -> CutPoints:
        root, tapped = self.called, self.tapped(config)
        return CutPoints(
            f"{root}.blocks",
            stem=(f"{root}.patch_embed", f"{root}.pos_embed"),
            stubs={f"{root}.pos_embed": _Positions},
            tail=(f"{root}.merger",),
            taps=f"{root}.{self.mergers}" if tapped else "",
            tapped=tapped,
        )

    def hidden(self, config: Any) -> HiddenShape:
        return HiddenShape(self.config(config).hidden_size, rows=self.merged(config))

    def in_order(self, config: Any, arguments: Arguments, rows: torch.Tensor) -> torch.Tensor:
        """Images come before videos, wherever their tokens are."""
        ids = arguments["input_ids"]
        image, video = (ids == self.token(config, kind) for kind in ("image", "video"))
        return rows[video[image | video].int().argsort(stable=True).argsort()]


def add_to_layer(
    language: Any, hidden: torch.Tensor, where: torch.Tensor, tap: torch.Tensor, row: Sequence[int]
) -> torch.Tensor:  # fmt: skip
    """See :meth:`.model_spec.ModelSpec.add_tap`; ``language`` is a GPTModel of Megatron's. A rank that has a part of
    the sequences adds what belongs there. Of what an encoder made, tensor-parallel ranks then have the whole gradient
    each, as of all that comes to the language model; Megatron-Bridge's and mcore-bridge's own have that of their
    part."""
    tensor, context = language.pg_collection.tp, language.pg_collection.cp
    numbers = where.flatten().cumsum(0).view_as(where) - 1
    own = torch.arange(where.shape[1])
    if context.size() > 1:
        own = shard_rows(row, context.size(), context.rank())
    if language.config.sequence_parallel:
        own = own.chunk(tensor.size())[tensor.rank()]
        tap = copy_to_tensor_model_parallel_region(tap, tensor)
    own = own.to(where.device)
    places = where[:, own]
    added = hidden.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    added[places] = added[places] + tap[numbers[:, own][places]].to(added.dtype)
    return added.transpose(0, 1).contiguous()
