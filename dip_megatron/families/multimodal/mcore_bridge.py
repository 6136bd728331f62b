"""Multimodal models of mcore-bridge, which ms-swift trains.

mcore-bridge has one class for all of them; what differs is the class of the encoder's wrapper in it, which also merges
the encoder's embeddings into the text's: a page is of models with one such class.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any, ClassVar

import torch
from mcore_bridge.model import MultimodalGPTModel

from ...compat.bridge_building import NoLanguageModel
from ...compat.mcore_bridge import by_class
from ...describe.files import ConfigurationError
from ..family import ModelFamily
from ..shared.shapes import LANGUAGE
from .family import family_of_class
from .grids import GridEncoder
from .model_spec import ModelSpec, drop, without_layers


class _Encoders(MultimodalGPTModel):
    """The model without its language model."""

    language_model_cls = NoLanguageModel


class WrappedVision(GridEncoder):
    """Hugging Face's vision transformer within mcore-bridge's wrapper."""

    called = "visual.visual"
    depth = "hf_config.vision_config.depth"

    def config(self, config: Any) -> Any:
        return config.hf_config.vision_config

    def token(self, config: Any, kind: str) -> int:
        found: int = getattr(config.hf_config, f"{kind}_token_id")
        return found


class McoreBridgeSpec(ModelSpec):
    """Models whose encoder has the wrapper ``visual_class``. For a microbatch of text alone mcore-bridge runs the
    encoder on an empty picture and adds nothing of it: DIP doesn't. Loops freeze parameters by themselves, and plans
    follow what trains."""

    model_class = MultimodalGPTModel
    visual_class: ClassVar[type[torch.nn.Module]]
    tower: ClassVar[str] = ""
    """The encoder within the wrapper, where the wrapper asks it for more than what it is called for."""
    replicates = False  # mcore-bridge's export knows of one copy
    shares = shares_packed = True

    def check(self, config: Any) -> None:
        super().check(config)
        if getattr(config, "mtp_shared_weights", False):
            raise ConfigurationError(
                "DIP hasn't been tried with one layer for all depths of multi-token prediction; leave out "
                "mtp_shared_weights, or use schedule off"
            )
        if config.mtp_num_layers and config.context_parallel_size > 1:
            raise ConfigurationError(
                "DIP hasn't been tried with multi-token prediction of mcore-bridge's models on shares of sequences; "
                "leave out mtp_num_layers, or use context_parallel_size 1"
            )
        if config.language_model_only:
            raise ConfigurationError(f"DIP has no family for {self.name} without its encoder; use schedule off")

    def check_layers(self, config: Any, layers: Mapping[str, tuple[tuple[int, ...], ...]]) -> None:
        if config.mtp_num_layers and not layers[LANGUAGE][-1][-1]:
            raise ConfigurationError(
                "mcore-bridge looks for the last layer's norm beside multi-token prediction; give the last chunk of "
                f"{LANGUAGE} a layer"
            )

    def tied(self, config: Any) -> bool:
        return not config.untie_embeddings_and_output_weights

    def vocabulary(self, config: Any) -> int:
        return int(config.padded_vocab_size)

    def position_tokens(self, config: Any) -> tuple[int, ...]:
        return super().position_tokens(config.hf_config)

    def carried(self, config: Any) -> int:
        """For multi-token prediction, which reads pictures' embeddings too, mcore-bridge hands those of the whole
        sequence on from stage to stage, behind the hidden states."""
        return 2 if config.mtp_num_layers else 1

    def longest(self, config: Any) -> int:
        """mcore-bridge's config says no more than what the model could take; loops pad to a microbatch's longest."""
        return int(getattr(config, "seq_length", None) or min(config.max_position_embeddings, 8192))

    def bare(self, kwargs: Mapping[str, Any]) -> Any:
        own = copy.copy(kwargs["config"])
        model = _Encoders(**{**kwargs, "config": own, "pre_process": True, "post_process": False, "vp_stage": None})
        for module in model.visual.modules():
            if getattr(module, "gradient_checkpointing", False):  # InternViT's own code has it on
                module.gradient_checkpointing = False  # plans say what is recomputed
        return model

    def calling(self, model: Any) -> AbstractContextManager[None]:
        """mcore-bridge merges embeddings where it looks words up: in the class of that module, while it is called."""
        return by_class(model.language_model.embedding.word_embeddings) if model.pre_process else nullcontext()

    def chunk(self, kwargs: Mapping[str, Any], config: Any, *, first: bool, last: bool, segment: int) -> Any:
        """By mcore-bridge's own builder, which replaces some of Megatron's classes meanwhile."""
        builder = config.model_meta.loader(config)
        with without_layers(config, self.encoders):
            model = builder.build_model(pre_process=first, post_process=last, vp_stage=segment)
        drop(model, first, *(name for e in self.encoders for name in (e.called, *e.points(config).tail)))
        if first and self.tower:
            delattr(model.visual, self.tower)
            model.visual.__dict__[self.tower] = _Tower(model.language_model)
        if first:
            called = tuple(e.called.rpartition(".")[2] for e in self.encoders)
            model.visual.get_inputs_embeds = MethodType(_Merged(called), model.visual)
        return model


class _Tower(torch.nn.Module):
    """In the place of an encoder beside the language model, where the wrapper asks for its device and its dtype, and
    ms-swift for layers to adapt: it has none."""

    def __init__(self, language: torch.nn.Module):
        super().__init__()
        self._language = [language]  # a list, so that it isn't taken for a submodule

    @property
    def device(self) -> torch.device:
        return next(self._language[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self._language[0].parameters()).dtype


class _Merged:
    """Instead of the wrapper's own ``get_inputs_embeds``: that, where the microbatch has instances of what is
    ``called``."""

    def __init__(self, called: tuple[str, ...]):
        self._called = called

    def __call__(self, visual: Any, inputs_embeds: torch.Tensor, **given: Any) -> torch.Tensor:
        if all(visual.__dict__.get(name) is None for name in self._called):
            return inputs_embeds
        merged: torch.Tensor = type(visual).get_inputs_embeds(visual, inputs_embeds, **given)
        return merged


def families_of(pages: Sequence[McoreBridgeSpec]) -> tuple[ModelFamily, ...]:
    """One, of mcore-bridge's class, for the models of these pages."""
    by_visual = {page.visual_class: page for page in pages}

    def choose(kwargs: Mapping[str, Any]) -> ModelSpec:
        kind = kwargs["config"].model_meta.visual_cls
        if kind not in by_visual:
            raise ConfigurationError(
                f"DIP has no family for mcore-bridge's models with {getattr(kind, '__name__', 'no encoder')}, so far "
                f"for those with {', '.join(k.__name__ for k in by_visual)}; use schedule off"
            )
        return by_visual[kind]

    return (family_of_class("mcore-bridge", pages[0], choose),)
