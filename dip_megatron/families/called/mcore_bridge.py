"""Qwen2.5-VL of mcore-bridge, the models that ms-swift trains: Hugging Face's vision transformer before a GPT.

mcore-bridge has one class for all its multimodal models; what differs between them is the class of the encoder in it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from mcore_bridge.model import MultimodalGPTModel
from mcore_bridge.model.mm_gpts.qwen import Qwen2_5VL_Vit

from ...compat.bridge_building import NoLanguageModel
from ...compat.mcore_bridge import by_class
from ...describe.files import ConfigurationError
from ...describe.model import MultimodalModel, Parallel
from .family import family_of
from .page import Page, drop, without_layers
from .qwen25_vision import WindowedVision


class _Encoders(MultimodalGPTModel):
    """The model without its language model."""

    language_model_cls = NoLanguageModel


class Vision(WindowedVision):
    """Within a wrapper of mcore-bridge's, which also merges its embeddings into the text's."""

    called = "visual.visual"
    depth = "hf_config.vision_config.depth"

    def config(self, config: Any) -> Any:
        return config.hf_config.vision_config

    def token(self, config: Any, kind: str) -> int:
        found: int = getattr(config.hf_config, f"{kind}_token_id")
        return found


class McoreBridgeQwen25Vl(Page):
    """Images and videos of any size; text alone, for which mcore-bridge runs its encoder on an empty picture and adds
    nothing of it: DIP doesn't. Loops freeze parameters by themselves, and plans follow what trains."""

    name = "qwen2-5-vl-mcore-bridge"
    model_class = MultimodalGPTModel
    encoders = (Vision(),)
    replicates = False  # mcore-bridge's export knows of one copy

    def check(self, config: Any) -> None:
        super().check(config)
        kind = config.model_meta.visual_cls
        if kind is not Qwen2_5VL_Vit:
            raise ConfigurationError(
                f"DIP has no family for mcore-bridge's models with {getattr(kind, '__name__', 'no encoder')}, so far "
                "for those of Qwen2.5-VL alone; use schedule off"
            )
        if config.language_model_only:
            raise ConfigurationError("DIP has no family for Qwen2.5-VL without its encoder; use schedule off")

    def tied(self, config: Any) -> bool:
        return not config.untie_embeddings_and_output_weights

    def vocabulary(self, config: Any) -> int:
        return int(config.padded_vocab_size)

    def longest(self, config: Any) -> int:
        """mcore-bridge's config says no more than what the model could take; loops pad to a microbatch's longest."""
        return int(getattr(config, "seq_length", None) or min(config.max_position_embeddings, 8192))

    def describe(self, config: Any, freeze: Mapping[str, bool], parallel: Parallel) -> MultimodalModel:
        self.check(config)  # of another encoder, nothing below would be there
        return super().describe(config, freeze, parallel)

    def bare(self, kwargs: Mapping[str, Any]) -> Any:
        own = copy.copy(kwargs["config"])
        return _Encoders(**{**kwargs, "config": own, "pre_process": True, "post_process": False, "vp_stage": None})

    def calling(self, model: Any) -> AbstractContextManager[None]:
        """mcore-bridge merges embeddings where it looks words up: in the class of that module, while it is called."""
        return by_class(model.language_model.embedding.word_embeddings) if model.pre_process else nullcontext()

    def chunk(self, kwargs: Mapping[str, Any], config: Any, *, first: bool, last: bool, segment: int) -> Any:
        """By mcore-bridge's own builder, which replaces some of Megatron's classes meanwhile."""
        builder = config.model_meta.loader(config)
        with without_layers(config, self.encoders):
            model = builder.build_model(pre_process=first, post_process=last, vp_stage=segment)
        drop(model, first, *(e.called for e in self.encoders))
        if first:
            model.visual.get_inputs_embeds = MethodType(_merged, model.visual)
        return model


def _merged(visual: Any, inputs_embeds: torch.Tensor, **given: Any) -> torch.Tensor:
    """Instead of the wrapper's own ``get_inputs_embeds``: that, where the microbatch has instances."""
    if visual.__dict__.get("visual") is None:
        return inputs_embeds
    merged: torch.Tensor = type(visual).get_inputs_embeds(visual, inputs_embeds, **given)
    return merged


MCORE_BRIDGE_FAMILIES = (family_of(McoreBridgeQwen25Vl()),)
"""Importing this module imports mcore-bridge: the adapter of ms-swift does, once that is there."""
