"""GLM-4.1V and GLM-4.5V of mcore-bridge: Hugging Face's vision transformer before a GPT, dense or with experts."""

from __future__ import annotations

from mcore_bridge.model.mm_gpts.glm import Glm4vVit

from .glm_vision import GlmVision
from .grids import VIDEOS
from .mcore_bridge import McoreBridgeSpec, WrappedVision
from .model_spec import Arguments


class Vision(WrappedVision, GlmVision):
    """Of both."""


class McoreBridgeGlm(McoreBridgeSpec):
    """Images of any size; text alone."""

    name = "glm-4v-mcore-bridge"
    visual_class = Glm4vVit
    encoders = (Vision(),)

    def check_call(self, arguments: Arguments) -> None:
        """Their processor marks frames of videos with the token of images; mcore-bridge looks for one of videos, and
        gives the encoder a video as one picture of several frames, which it doesn't take."""
        if arguments.get(VIDEOS) is not None:
            raise ValueError(
                "mcore-bridge's GLM-4.5V finds no place for videos, whose frames have the token of images; train on "
                "images alone"
            )
