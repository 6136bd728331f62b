"""The thinker of Qwen2.5-Omni of Megatron-Bridge: Hugging Face's encoders of pictures and of sound, before a GPT."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from megatron.bridge.models.qwen_omni.modeling_qwen25_omni.model import Qwen25OmniModel
from torch.nn.functional import pad

from ...compat.bridge_building import without_language_model
from ...describe.model import AudioEmbedding, ModuleShape, TransformerLayer
from ..describe import trainable_parts
from ..shared.cut import CutPoints
from ..shared.layout import pinned
from .page import Arguments, Encoder, Page, drop, projector_of, without_layers
from .qwen25_vision import WindowedVision
from .shapes import HiddenShape


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


class Audio(Encoder):
    """An instance is a clip of mel features. Two rows between layers become one token; a last odd one is dropped, so
    that clips travel padded to an odd number of rows."""

    name, kind = "audio", "audios"
    called = "thinker.audio_model"
    depth = "thinker_config.audio_config.encoder_layers"
    values = ("input_features",)

    def points(self, config: Any) -> CutPoints:
        root = "thinker.audio_model"
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

    def tokens(self, config: Any, arguments: Arguments) -> list[int]:
        counted = [rows // 2 for rows in _rows(arguments)]
        places = int((arguments["input_ids"] == config.audio_token_id).sum())
        if places != sum(counted):
            raise ValueError(
                f"the microbatch has {places} audio tokens for {len(counted)} clips that become {sum(counted)}"
            )
        return counted

    def encode(self, model: Any, arguments: Arguments, own: slice, hidden: torch.Tensor | None) -> torch.Tensor:
        mask = arguments["feature_attention_mask"][own]
        if hidden is None:
            features = arguments["input_features"][own].to(model.config.params_dtype)
        else:
            features = hidden.new_zeros(mask.shape[0], model.thinker.audio_model.num_mel_bins, mask.shape[1])
        embeddings: torch.Tensor = model.thinker.get_audio_features(features, feature_attention_mask=mask)
        return embeddings

    def leaving(self, arguments: Arguments, own: slice, hidden: torch.Tensor) -> torch.Tensor:
        rows = _rows(arguments)[own]
        return pad(hidden, (0, 0, 0, sum(2 * (n // 2) + 1 for n in rows) - sum(rows)))

    def arriving(self, arguments: Arguments, own: slice, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[: sum(_rows(arguments)[own])]

    def lean(self, arguments: Arguments, present: bool) -> dict[str, Any]:
        return {} if present else {"input_features": None}

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        return _GivenAudio(embeddings)


class _GivenAudio:
    """Stands for the encoder of sound, of which the thinker also asks lengths."""

    def __init__(self, embeddings: torch.Tensor):
        self._embeddings = embeddings

    def _get_feat_extract_output_lengths(self, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return lengths, lengths

    def __call__(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self._embeddings)


def _rows(arguments: Arguments) -> list[int]:
    """Of each clip after its convolutions."""
    mask = arguments.get("feature_attention_mask")
    return [] if mask is None else [(length - 1) // 2 + 1 for length in mask.sum(dim=1).tolist()]


class Qwen25Omni(Page):
    """Pictures, videos and sound in, text out; its talker isn't trained here, nor by Bridge."""

    name = "qwen2-5-omni"
    model_class = Qwen25OmniModel
    encoders = (Vision(), Audio())
    config_name = "language_transformer_config"
    language = "thinker.language_model"

    def bare(self, kwargs: Mapping[str, Any]) -> Any:
        with without_language_model("megatron.bridge.models.qwen_omni.modeling_qwen25_omni.thinker_model"):
            return Qwen25OmniModel(**{**kwargs, "pre_process": True, "post_process": False})

    def chunk(self, kwargs: Mapping[str, Any], config: Any, *, first: bool, last: bool, segment: int) -> Any:
        own = pinned(config, segment)
        own.thinker_config = kwargs["thinker_transformer_config"]
        with without_layers(own, self.encoders):
            given = {"language_transformer_config": own, "thinker_transformer_config": own.thinker_config}
            model = Qwen25OmniModel(**{**kwargs, **given, "pre_process": first, "post_process": last})
        drop(model, first, *(e.called for e in self.encoders))
        return model
