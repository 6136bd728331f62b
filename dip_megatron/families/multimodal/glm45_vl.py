"""GLM-4.5V of Megatron-Bridge: Hugging Face's vision transformer before a GPT."""

from __future__ import annotations

from typing import Any

import torch
from megatron.bridge.models.glm_vl.modeling_glm_45v import GLM45VModel

from .glm_vision import GlmVision
from .model_spec import Arguments, ProviderSpec, check_places


class Vision(GlmVision):
    """An instance is an image, or a frame of a video, as the model's forward takes videos apart."""

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


class Glm45Vl(ProviderSpec):
    """Its first layers have no experts."""

    name = "glm-4-5v"
    model_class = GLM45VModel
    encoders = (Vision(),)
