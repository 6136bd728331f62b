"""Megatron-Core's MIMO models: a GPT that is given what encoders, one a modality, have made.

Megatron itself runs such a model without a pipeline, or with encoders on ranks of their own. Under DIP the submodule of
each modality is cut into segments, and chunks of the language model are what Megatron's ranks without encoders are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from ...compat import mimo
from ...compat.bridge_building import NoLanguageModel
from ...compat.layer_specs import spec_of_chunk
from ...describe.files import ConfigurationError
from ...describe.model import (
    LanguageHead,
    ModuleShape,
    MultimodalModel,
    Parallel,
    Projector,
    TokenEmbedding,
)
from ...describe.model.ends import Head, Nothing
from ..describe import layer_shape
from ..family import Blueprint, Layers, ModelFamily
from ..shared.cut import CutPoints
from ..shared.layout import order_free
from ..shared.shapes import LANGUAGE
from .mimo_encoders import encoder_of
from .model_spec import Arguments, Encoder, ModelSpec, check_places, projector_of
from .program import MultimodalProgram
from .shapes import HiddenShape

_MIMO: Any = mimo.mimo()
_ARGUMENT = "modality_inputs"


class Modality(Encoder):
    """The encoder of one modality and the projection behind it: ``spec`` builds both, ``token`` stands in the text
    where they are put."""

    values = (_ARGUMENT,)
    splits = True

    def __init__(self, name: str, kind: str, spec: Any, token: int):
        """Raises ConfigurationError for what can't be cut."""
        self.name, self.kind, self.called = name, kind, f"modality_submodules.{name}"
        parts = spec.submodules or {}
        encoders = parts.get("encoders") or {}
        if len(encoders) != 1:
            raise ConfigurationError(
                f"modality {name} has {len(encoders)} encoders, whose tokens stand one encoder after the other; DIP "
                "cuts modalities of one: make each a modality of its own, or use --dip-schedule off"
            )
        for unused in ("decoders", "output_projections"):
            if parts.get(unused):
                raise ConfigurationError(f"modality {name} has {unused}, which DIP can't run; leave them out")
        ((self._encoder, built),) = encoders.items()
        self._params = dict(built.params or {})
        self._entry, self._token = encoder_of(built.module), token
        self._projections = parts.get("input_projections") or []

    def points(self, config: Any) -> CutPoints:
        own, before = self._entry.points(self._params), f"{self.called}.encoders.{self._encoder}."
        if own.taps:
            raise ConfigurationError(f"modality {self.name}: MIMO models have no place for what taps make")
        return replace(
            own, layers=before + own.layers, stem=tuple(before + name for name in own.stem),
            unused=tuple(before + name for name in own.unused),
            tail=(*(before + name for name in own.tail), f"{self.called}.input_projections"),
            stubs={before + name: stub for name, stub in own.stubs.items()},
        )  # fmt: skip

    def hidden(self, config: Any) -> HiddenShape:
        return self._entry.hidden(self._params)

    def layers(self, config: Any) -> int:
        return self._entry.layers(self._params)

    def describe(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        layer = self._entry.layer(self._params)
        return ModuleShape(
            self.name, self.kind, self.layers(config), layer, self._entry.stem(self._params),
            self._head(layer.hidden, config.hidden_size),
        )  # fmt: skip

    def _head(self, width: int, output: int) -> Head:
        if not self._projections:
            return Nothing()
        params = self._projections[0].params or {}
        if params.get("projector_type") == "mlp" and "config" in params:
            own = params["config"]
            return Projector(output, own.ffn_hidden_size * (1 + bool(own.gated_linear_unit)))
        return projector_of(width * output, width, output, 1)

    def tokens(self, config: Any, arguments: Arguments) -> list[int]:
        given = (arguments.get(_ARGUMENT) or {}).get(self.name)
        if given and self._encoder not in given:
            raise ValueError(f"the microbatch has {', '.join(given)} for modality {self.name}, not {self._encoder}")
        counted = self._entry.tokens(self._params, given[self._encoder]) if given else []
        return check_places(arguments, self._token, counted, self.name, "instances")

    def _some(self, arguments: Arguments, own: slice) -> dict[str, Any]:
        """What the encoder is called with, for some instances."""
        given = (arguments.get(_ARGUMENT) or {}).get(self.name)
        if not given:
            raise ValueError(
                f"the script's forward_step gives a pipeline rank no {_ARGUMENT} for {self.name}; every rank runs some "
                "of its layers, and needs them"
            )
        return self._entry.some(self._params, given[self._encoder], own)

    def encode(self, model: Any, arguments: Arguments, own: slice, hidden: torch.Tensor | None) -> torch.Tensor:
        some = self._some(arguments, own)
        embeddings: torch.Tensor = model.modality_submodules[self.name].forward(encoder_inputs={self._encoder: some})
        return embeddings

    def given(self, config: Any, embeddings: torch.Tensor) -> Any:
        return embeddings

    def leaving(self, arguments: Arguments, own: slice, hidden: torch.Tensor) -> torch.Tensor:
        return self._entry.leaving(hidden, self._some(arguments, own))

    def arriving(self, arguments: Arguments, own: slice, hidden: torch.Tensor) -> torch.Tensor:
        return self._entry.arriving(hidden, self._some(arguments, own))


class MimoSpec(ModelSpec):
    """Of one model, whose MimoModelConfig says which modalities it has: each is a module of its own, by its name. Of
    pictures and sound the first of each are images and audios for workloads."""

    name = "mimo"
    model_class = getattr(_MIMO, "MimoModel", torch.nn.Module)
    workload = "vision-audio-mix"
    usual_picture = 256

    def __init__(self, given: Any):
        """``given`` is the MimoModelConfig. Raises ConfigurationError for a model that can't be segmented."""
        self._given, self._text = given, given.language_model_spec
        if not issubclass(self._text.module, GPTModel):
            raise ConfigurationError(
                f"DIP can segment MIMO models whose language model is a GPTModel, not a {self._text.module.__name__}; "
                "use --dip-schedule off"
            )
        if given.module_to_grid_map:
            raise ConfigurationError("DIP places encoders itself; leave out module_to_grid_map")
        kinds, encoders = {"vision": "images", "audio": "audios"}, []
        for name, spec in given.modality_submodules_spec.items():
            if name == LANGUAGE:
                raise ConfigurationError("a modality is called language, as the language model is; rename it")
            kind = next((k for k in kinds if spec.module.__module__.endswith(f".{k}")), "")
            token = given.special_token_ids.get(name)
            if token is None:
                raise ConfigurationError(f"modality {name} has no token; give it one (special_token_ids)")
            encoders.append(Modality(name, kinds.pop(kind, name), spec, token))
        self.encoders = tuple(encoders)

    def check(self, config: Any) -> None:
        super().check(config)
        for owner in (spec for e in self._given.modality_submodules_spec.values() for spec in _configs(e)):
            if owner.sequence_parallel or owner.context_parallel_size > 1:
                raise ValueError(
                    "an encoder's sequence_parallel or context_parallel_size is set: instances are not shared out by "
                    "tokens; leave both out of its config"
                )

    def taken(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The whole model drops masks: its language model's own is causal."""
        return arguments | {"attention_mask": None}

    def packed(self, arguments: Arguments) -> Any:
        given = arguments.get("packing_kwargs")
        return None if given is None else SimpleNamespace(**{"cu_seqlens_q_padded": None, **given})

    def tied(self, config: Any) -> bool:
        return bool(self._text.params.get("share_embeddings_and_output_weights", False))

    def vocabulary(self, config: Any) -> int:
        return int(self._text.params["vocab_size"])

    def longest(self, config: Any) -> int:
        return int(self._text.params["max_sequence_length"])

    def decoder(self, config: Any, freeze: Mapping[str, bool]) -> ModuleShape:
        words = self.vocabulary(config)
        return ModuleShape(
            LANGUAGE, "text", config.num_layers,
            layer_shape(config, causal=True, spec=self._text.params["transformer_layer_spec"]), TokenEmbedding(words),
            LanguageHead(words, self.tied(config)), tuple(e.name for e in self.encoders),
        )  # fmt: skip

    def bare(self, kwargs: Mapping[str, Any]) -> Any:
        config = copy.copy(kwargs[self.config_name])
        config.sequence_parallel = False  # nothing to share out here
        modalities = {name: _alone(spec) for name, spec in self._given.modality_submodules_spec.items()}
        return self._built(kwargs, ModuleSpec(NoLanguageModel, params={"config": config}), modalities)

    def chunk(self, kwargs: Mapping[str, Any], config: Any, *, first: bool, last: bool, segment: int) -> Any:
        params, layout = dict(self._text.params), config.pipeline_model_parallel_layout
        own = layout.get_layer_offset(vp_stage=segment), layout.get_num_layers_to_build(vp_stage=segment)
        spec = spec_of_chunk(params["transformer_layer_spec"], *own, config.num_layers)
        params |= {"config": config, "transformer_layer_spec": spec, "vp_stage": segment}
        params |= {"pre_process": first, "post_process": last}
        text = ModuleSpec(self._text.module, params=params, submodules=self._text.submodules)
        model = self._built(kwargs, text, {})
        mimo.stand(model, first, last)
        model.shared_embedding_or_output_weight = model.language_model.shared_embedding_or_output_weight
        return model

    def _built(self, kwargs: Mapping[str, Any], text: ModuleSpec, modalities: Mapping[str, Any]) -> Any:
        given = replace(self._given, language_model_spec=text, modality_submodules_spec=dict(modalities))
        groups = {name: kwargs[name] for name in ("cp_group", "tp_group") if name in kwargs}
        model: Any = self.model_class(given, **groups)
        model.pg_collection = ProcessGroupCollection.use_mpu_process_groups()  # Megatron's loop asks models for it
        return model

    @contextmanager
    def calling(self, model: Any) -> Iterator[None]:
        if model.pre_process:
            held = vars(model.modality_submodules)
            embeddings = {e.name: held[e.name] for e in self.encoders if held.get(e.name) is not None}
            mimo.hand(model, embeddings)
        else:
            mimo.hand(model, {}, model.input_tensors)
        try:
            yield
        finally:
            mimo.hand(model, {})

    def hidden_of(self, output: Any) -> torch.Tensor:
        hidden: torch.Tensor = mimo.hidden_of(output)
        return hidden


def _configs(spec: Any) -> Iterator[TransformerConfig]:
    """Those that a modality's encoders are built by."""
    for encoder in ((spec.submodules or {}).get("encoders") or {}).values():
        yield from (value for value in (encoder.params or {}).values() if isinstance(value, TransformerConfig))


def _alone(spec: Any) -> Any:
    """The spec of a modality that is built whole, whatever pipeline its configs speak of."""

    def own(part: Any) -> Any:
        if not isinstance(part, ModuleSpec):
            return part
        params = {n: _unpiped(v) if isinstance(v, TransformerConfig) else v for n, v in (part.params or {}).items()}
        return ModuleSpec(part.module, params=params, submodules=part.submodules)

    parts = dict(spec.submodules or {})
    parts["encoders"] = {name: own(part) for name, part in (parts.get("encoders") or {}).items()}
    parts["input_projections"] = [own(part) for part in parts.get("input_projections") or []]
    return ModuleSpec(spec.module, params=spec.params, submodules=parts)


def _unpiped(config: TransformerConfig) -> TransformerConfig:
    built = order_free(config)
    built.pipeline_model_parallel_size, built.virtual_pipeline_model_parallel_size = 1, None
    built.pipeline_model_parallel_layout = None
    if built.recompute_granularity == "full":
        built.recompute_granularity = None  # plans say what is recomputed
    return built


def _page(blueprint: Blueprint) -> tuple[MimoSpec, dict[str, Any]]:
    """A model's page, and the arguments of its constructor, the language model's config among them."""
    page = MimoSpec(blueprint.kwargs["mimo_config"])
    text = page._text.params
    return page, {**blueprint.kwargs, page.config_name: text["config"]}


def _describe(blueprint: Blueprint, parallel: Parallel) -> MultimodalModel:
    page, kwargs = _page(blueprint)
    return page.describe(kwargs[page.config_name], {}, parallel)


def _program(blueprint: Blueprint, layers: Layers, *, rank: int, micro_batch_size: int) -> MultimodalProgram:
    page, kwargs = _page(blueprint)
    return MultimodalProgram(page, kwargs, layers, rank=rank, micro_batch_size=micro_batch_size)


MIMO = ModelFamily("mimo", MimoSpec.model_class, _describe, _program, MimoSpec.workload, replicates=True)
