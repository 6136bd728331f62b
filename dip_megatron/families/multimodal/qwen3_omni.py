"""The thinker of Qwen3-Omni of Megatron-Bridge: Hugging Face's encoders of pictures, which also feed the language
model's first layers (deepstack), and of sound, before a GPT with experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.bridge.models.qwen_omni.modeling_qwen3_omni.model import Qwen3OmniModel

from ...compat.bridge_building import sound_tokens
from ...describe.model import FeatureEmbedding, ModuleShape, TransformerLayer
from ..describe import trainable_parts
from ..shared.cut import CutPoints
from .deepstack import HuggingFaceVision, add_to_layer
from .model_spec import Arguments, projector_of
from .shapes import HiddenShape
from .thinker import Sound, ThinkerSpec, lengths


class Vision(HuggingFaceVision):
    """Bridge freezes all of it or nothing."""

    called = "thinker.visual"
    mergers = "merger_list"
    depth = "thinker_config.vision_config.depth"

    def config(self, config: Any) -> Any:
        return config.thinker_config.vision_config

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        return super().describe(
            config, {**freeze, "freeze_vision_projection": freeze.get("freeze_vision_model", False)}
        )


class _Convolution(torch.nn.Module):
    """In a convolution's place on chunks after the first: as long an output, of nothing."""

    def __init__(self, whole: torch.nn.Module):
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, channels, mel bins, length]`` of a kernel of three and every second place."""
        return x.new_zeros(x.shape[0], 1, 1, (x.shape[3] + 1) // 2)


class Audio(Sound):
    """A second of a clip becomes 13 tokens."""

    def points(self, config: Any) -> CutPoints:
        root = self.called
        convolutions = [f"{root}.conv2d{number}" for number in (1, 2, 3)]
        return CutPoints(
            f"{root}.layers",
            stem=(*convolutions, f"{root}.conv_out"),
            stubs=dict.fromkeys(convolutions, _Convolution),
            tail=(f"{root}.ln_post", f"{root}.proj1", f"{root}.proj2"),
            halves=("self_attn", ""),
            returns_tuple=True,
        )

    def hidden(self, config: Any) -> HiddenShape:
        return HiddenShape(config.thinker_config.audio_config.d_model)

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        """Its convolutions are a linear of as many parameters, although they do more work."""
        audio = config.thinker_config.audio_config
        width, heads, channels = audio.d_model, audio.encoder_attention_heads, audio.downsample_hidden_size
        bins = -(-audio.num_mel_bins // 8)
        convolutions = 9 * channels + 18 * channels**2 + bins * channels * width
        hears = not freeze.get("freeze_audio_model")
        window = int(sound_tokens(torch.tensor([audio.n_window_infer])))
        return ModuleShape(
            self.name, self.kind, audio.encoder_layers,
            TransformerLayer(width, audio.encoder_ffn_dim, heads, heads, window=window),
            FeatureEmbedding(round(convolutions / width)),
            projector_of(width * (width + config.hidden_size), width, config.hidden_size, 1),
            trainable=trainable_parts(stem=hears, layers=hears, head=hears),
        )  # fmt: skip

    def counted(self, arguments: Arguments) -> list[int]:
        """Bridge's thinker takes one clip a microbatch."""
        found = [int(count) for count in sound_tokens(lengths(arguments))]
        if len(found) > 1:
            raise ValueError(
                f"the microbatch has {len(found)} clips, of which Megatron-Bridge's Qwen3-Omni takes one; use a micro "
                "batch size of 1 and one clip a sample"
            )
        return found


class Qwen3Omni(ThinkerSpec):
    """The thinker."""

    name = "qwen3-omni"
    model_class = Qwen3OmniModel
    encoders = (Vision(), Audio())
    module = "megatron.bridge.models.qwen_omni.modeling_qwen3_omni.thinker_model"
    usual_picture = 300
    """Patches of 16 x 16, four a token."""

    def add_tap(
        self, model: Any, hidden: torch.Tensor, where: torch.Tensor, tap: torch.Tensor, row: Sequence[int]
    ) -> torch.Tensor:  # fmt: skip
        return add_to_layer(model.thinker.language_model, hidden, where, tap, row)
