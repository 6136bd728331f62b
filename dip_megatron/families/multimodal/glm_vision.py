"""Hugging Face's vision transformer of GLM-4.5V, whichever model calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...describe.model import ModuleShape, PatchEmbedding, TransformerLayer
from ..describe import trainable_parts
from ..shared.cut import CutPoints
from .grids import GridEncoder
from .model_spec import projector_of
from .shapes import HiddenShape


class GlmVision(GridEncoder):
    """Instances are images, then videos."""

    def points(self, config: Any) -> CutPoints:
        root = self.called
        return CutPoints(
            f"{root}.blocks",
            stem=(f"{root}.patch_embed", f"{root}.post_conv_layernorm", f"{root}.embeddings"),
            tail=(f"{root}.post_layernorm", f"{root}.downsample", f"{root}.merger"),
        )

    def hidden(self, config: Any) -> HiddenShape:
        return HiddenShape(self.config(config).hidden_size, rows=self.merged(config))

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        """Bridge's freeze leaves the position embedding and the convolution before the merger to train."""
        vision = self.config(config)
        merge, heads, width = vision.spatial_merge_size, vision.num_heads, vision.hidden_size
        sees = not freeze.get("freeze_vision_model")
        output = vision.out_hidden_size
        # A convolution, one matrix, and a gated MLP.
        parameters = output * (merge**2 * width + output + 3 * vision.intermediate_size)
        return ModuleShape(
            self.name, self.kind, vision.depth, TransformerLayer(width, output, heads, heads, gated=True),
            PatchEmbedding(vision.patch_size, vision.in_channels, vision.temporal_patch_size),
            projector_of(parameters, width, output, merge**2),
            trainable=trainable_parts(stem=True, layers=sees, head=True),
        )  # fmt: skip
