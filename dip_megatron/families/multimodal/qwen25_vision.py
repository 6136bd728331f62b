"""Hugging Face's vision transformers of Qwen2.5-VL and Qwen2-VL, whichever model calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...describe.model import ModuleShape, PatchEmbedding, Projector, TransformerLayer
from ..describe import trainable_parts
from ..shared.cut import CutPoints
from .grids import GridEncoder
from .model_spec import projector_of
from .shapes import HiddenShape


class WindowedVision(GridEncoder):
    """Patches travel in the order of windows in which the layers have them."""

    def points(self, config: Any) -> CutPoints:
        name = self.called
        return CutPoints(f"{name}.blocks", stem=(f"{name}.patch_embed",), tail=(f"{name}.merger",))

    def hidden(self, config: Any) -> HiddenShape:
        return HiddenShape(self.config(config).hidden_size, rows=self.merged(config))

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        """Layers of full attention are taken to come at equal distances."""
        vision = self.config(config)
        merge = vision.spatial_merge_size
        full = len(vision.fullatt_block_indexes)
        layer = TransformerLayer(
            hidden=vision.hidden_size, ffn=vision.intermediate_size, heads=vision.num_heads, kv_groups=vision.num_heads,
            gated=True, window=(vision.window_size // merge // vision.patch_size * merge) ** 2,
            full_attention_every=vision.depth // full if full else 0,
        )  # fmt: skip
        sees = not freeze.get("freeze_vision_model")
        return ModuleShape(
            self.name, self.kind, vision.depth, layer,
            PatchEmbedding(vision.patch_size, vision.in_channels, vision.temporal_patch_size),
            Projector(config.hidden_size, vision.hidden_size * merge**2, merge**2),
            trainable=trainable_parts(stem=sees, layers=sees, head=not freeze.get("freeze_vision_projection")),
        )  # fmt: skip


class FullVision(WindowedVision):
    """Qwen2-VL's has full attention within each frame, and MLPs of two matrices; of its config, ``hidden_size`` is the
    language model's."""

    def hidden(self, config: Any) -> HiddenShape:
        return HiddenShape(self.config(config).embed_dim, rows=self.merged(config))

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        vision = self.config(config)
        width, merged, output = vision.embed_dim, self.merged(config), vision.hidden_size
        return ModuleShape(
            self.name, self.kind, vision.depth,
            TransformerLayer(width, int(width * vision.mlp_ratio), vision.num_heads, vision.num_heads),
            PatchEmbedding(vision.patch_size, vision.in_channels, vision.temporal_patch_size),
            projector_of(merged * width * (merged * width + output), width, output, merged),
            trainable=trainable_parts(stem=True, layers=True, head=True),
        )  # fmt: skip
