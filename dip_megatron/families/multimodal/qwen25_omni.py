"""The thinker of Qwen2.5-Omni of Megatron-Bridge: Hugging Face's encoders of pictures and of sound, before a GPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.bridge.models.qwen_omni.modeling_qwen25_omni.model import Qwen25OmniModel
from torch.nn.functional import pad

from ...describe.model import AudioEmbedding, ModuleShape, TransformerLayer
from ..describe import trainable_parts
from ..shared.cut import CutPoints
from .model_spec import Arguments, projector_of
from .qwen25_vision import WindowedVision
from .shapes import HiddenShape
from .thinker import Sound, ThinkerSpec, lengths


class Vision(WindowedVision):
    """As Qwen2.5-VL's; Bridge freezes all of it or nothing."""

    called = "thinker.visual"
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
        found: Any = whole
        self._channels, self._stride, self._edge = found.out_channels, found.stride[0], 2 * found.padding[0] - 2
        self.weight = torch.empty(0, dtype=found.weight.dtype)  # of which the encoder asks the dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, channels, length]`` of a kernel of three."""
        return x.new_zeros(x.shape[0], self._channels, (x.shape[2] + self._edge - 1) // self._stride + 1)


class Audio(Sound):
    """Two rows between layers become one token; a last odd one is dropped, so that clips travel padded to an odd number
    of rows."""

    def points(self, config: Any) -> CutPoints:
        root = self.called
        return CutPoints(
            f"{root}.layers",
            stem=(f"{root}.conv1", f"{root}.conv2", f"{root}.audio_bos_eos_token"),
            stubs={f"{root}.conv1": _Convolution, f"{root}.conv2": _Convolution},
            tail=(f"{root}.ln_post", f"{root}.proj"),
            halves=("self_attn", ""),
            returns_tuple=True,
        )

    def hidden(self, config: Any) -> HiddenShape:
        return HiddenShape(config.thinker_config.audio_config.d_model, rows=2, extra=1)

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        audio = config.thinker_config.audio_config
        width, heads = audio.d_model, audio.encoder_attention_heads
        hears = not freeze.get("freeze_audio_model")
        return ModuleShape(
            self.name, self.kind, audio.encoder_layers,
            TransformerLayer(width, audio.encoder_ffn_dim, heads, heads, window=audio.n_window),
            AudioEmbedding(audio.num_mel_bins), projector_of(width * config.hidden_size, width, config.hidden_size, 2),
            trainable=trainable_parts(stem=hears, layers=hears, head=hears),
        )  # fmt: skip

    def counted(self, arguments: Arguments) -> list[int]:
        return [rows // 2 for rows in _rows(arguments)]

    def leaving(self, arguments: Arguments, own: slice, hidden: torch.Tensor) -> torch.Tensor:
        rows = _rows(arguments)[own]
        return pad(hidden, (0, 0, 0, sum(2 * (n // 2) + 1 for n in rows) - sum(rows)))

    def arriving(self, arguments: Arguments, own: slice, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[: sum(_rows(arguments)[own])]


def _rows(arguments: Arguments) -> list[int]:
    """Of each clip after its convolutions."""
    return [(length - 1) // 2 + 1 for length in lengths(arguments).tolist()]


class Qwen25Omni(ThinkerSpec):
    """The thinker."""

    name = "qwen2-5-omni"
    model_class = Qwen25OmniModel
    encoders = (Vision(), Audio())
    module = "megatron.bridge.models.qwen_omni.modeling_qwen25_omni.thinker_model"
