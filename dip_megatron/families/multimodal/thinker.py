"""What the pages of Qwen's omni models of Megatron-Bridge share: a thinker of pictures, sound and text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from ...compat.bridge_building import without_language_model
from ..shared.layout import pinned
from .model_spec import Arguments, Encoder, ModelSpec, check_places, drop, without_layers


class ThinkerSpec(ModelSpec):
    """Pictures, videos and sound in, text out; a talker isn't trained here, nor by Bridge. ``module`` is Bridge's of
    the thinker's class."""

    config_name = "language_transformer_config"
    language = "thinker.language_model"
    shares = True
    module: ClassVar[str]

    def bare(self, kwargs: Mapping[str, Any]) -> Any:
        with without_language_model(self.module):
            return self.model_class(**{**kwargs, "pre_process": True, "post_process": False})

    def chunk(self, kwargs: Mapping[str, Any], config: Any, *, first: bool, last: bool, segment: int) -> Any:
        own: Any = pinned(config, segment)
        own.thinker_config = kwargs["thinker_transformer_config"]
        with without_layers(own, self.encoders):
            given = {"language_transformer_config": own, "thinker_transformer_config": own.thinker_config}
            model = self.model_class(**{**kwargs, **given, "pre_process": first, "post_process": last})
        drop(model, first, *(e.called for e in self.encoders))
        return model


class Sound(Encoder):
    """An instance is a clip of mel features."""

    name, kind = "audio", "audios"
    called = "thinker.audio_model"
    depth = "thinker_config.audio_config.encoder_layers"
    values = ("input_features",)

    @abstractmethod
    def counted(self, arguments: Arguments) -> list[int]:
        """Tokens of each clip, as the encoder makes them."""

    def tokens(self, config: Any, arguments: Arguments) -> list[int]:
        return check_places(arguments, config.audio_token_id, self.counted(arguments), "audio", "clips")

    def encode(self, model: Any, arguments: Arguments, own: slice, hidden: torch.Tensor | None) -> torch.Tensor:
        mask = arguments["feature_attention_mask"][own]
        if hidden is None:
            features = arguments["input_features"][own].to(model.config.params_dtype)
        else:
            features = hidden.new_zeros(mask.shape[0], model.thinker.audio_model.num_mel_bins, mask.shape[1])
        embeddings: torch.Tensor = model.thinker.get_audio_features(features, feature_attention_mask=mask)
        return embeddings

    def lean(self, arguments: Arguments, present: bool) -> dict[str, Any]:
        return {} if present else {"input_features": None}

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        return _GivenSound(embeddings)


class _GivenSound:
    """Stands for the encoder of sound, of which the thinker also asks lengths."""

    def __init__(self, embeddings: torch.Tensor):
        self._embeddings = embeddings

    def _get_feat_extract_output_lengths(self, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return lengths, lengths

    def __call__(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self._embeddings)


def lengths(arguments: Arguments) -> torch.Tensor:
    """Mel frames of each clip, ``[clips]``."""
    mask = arguments.get("feature_attention_mask")
    return torch.empty(0, dtype=torch.long) if mask is None else mask.sum(dim=1)
