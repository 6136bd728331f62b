"""GLM-4.5V of Megatron-Bridge: Hugging Face's vision transformer before a GPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.bridge.models.glm_vl.modeling_glm_45v import GLM45VModel

from ...describe.model import ModuleShape, PatchEmbedding, TransformerLayer
from ..describe import trainable_parts
from ..shared.cut import CutPoints
from .grids import GridEncoder
from .page import Arguments, ProviderPage, check_places, projector_of
from .shapes import HiddenShape


class Vision(GridEncoder):
    """An instance is an image, or a frame of a video, as the model's forward takes videos apart."""

    def points(self, config: Any) -> CutPoints:
        return CutPoints(
            "visual.blocks",
            stem=("visual.patch_embed", "visual.post_conv_layernorm", "visual.embeddings"),
            tail=("visual.post_layernorm", "visual.downsample", "visual.merger"),
        )

    def hidden(self, config: Any) -> HiddenShape:
        return HiddenShape(config.vision_config.hidden_size, rows=self.merged(config))

    def grids(self, arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
        images, videos = super().grids(arguments)
        frames = videos.repeat_interleave(videos[:, 0], dim=0)
        frames[:, 0] = 1
        return images, frames

    def tokens(self, config: Any, arguments: Arguments) -> list[int]:
        """Images and frames have the same token."""
        images, frames = self.grids(arguments)
        if len(images) and len(frames):
            raise ValueError("GLM-4.5V has one token for images and videos: let a microbatch hold either")
        counted = [patches // self.merged(config) for patches in torch.cat((images, frames)).prod(dim=-1).tolist()]
        return check_places(arguments, config.image_token_id, counted, "image", "images or frames")

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        """Bridge's freeze leaves the position embedding and the convolution before the merger to train."""
        vision, merge = config.vision_config, config.vision_config.spatial_merge_size
        heads, width = vision.num_heads, vision.hidden_size
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


class Glm45Vl(ProviderPage):
    """Its first layers have no experts."""

    name = "glm-4-5v"
    model_class = GLM45VModel
    encoders = (Vision(),)
