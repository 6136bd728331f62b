"""Megatron-Core's block specs, which list the layers of one pipeline rank."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock as MultiTokenPrediction
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from .names import Name, Topic

__all__ = ["TOPIC", "MultiTokenPrediction", "TransformerBlockSubmodules"]
_GPT = "megatron.core.models.gpt.gpt_layer_specs"
_FILES = (
    _GPT,
    "megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs",
    "megatron.core.models.gpt.experimental_attention_variant_module_specs",  # 0.19 and newer
)
TOPIC = Topic(
    "models whose layers differ",
    "megatron-core",
    "0.16.1, 0.19.2",
    "models whose specs list each layer (experts in some or all of them) can't be trained under DIP",
    (
        Name("megatron.core.transformer.transformer_block:TransformerBlockSubmodules", has=("layer_specs",)),
        Name("megatron.core.transformer.multi_token_prediction:MultiTokenPredictionBlock", has=("layers",)),
        Name(f"{_GPT}:get_num_layers_to_build", ("config", "vp_stage", "pp_rank")),
        Name(f"{_GPT}:get_transformer_layer_offset", ("config", "vp_stage", "pp_rank")),
        Name(f"{_GPT}:get_mtp_num_layers_to_build", ("config", "vp_stage", "pp_rank")),
        Name(f"{_GPT}:get_mtp_layer_offset", ("config",)),
    ),
)


@contextlib.contextmanager
def specs_of_all_layers() -> Iterator[None]:
    """Within, Megatron's functions that make a block's spec list the layers of the whole model, those of multi-token
    prediction too, where they would list what the model's own pipeline gives this rank."""
    stand_ins = {
        "get_num_layers_to_build": lambda config, *_, **__: config.num_layers,
        "get_transformer_layer_offset": lambda *_, **__: 0,
        "get_mtp_num_layers_to_build": lambda config, *_, **__: config.mtp_num_layers or 0,
        "get_mtp_layer_offset": lambda *_, **__: 0,
    }
    modules = [importlib.import_module(name) for name in _FILES if importlib.util.find_spec(name) is not None]
    held = [(module, name, getattr(module, name)) for module in modules for name in stand_ins if hasattr(module, name)]
    for module, name, _ in held:
        setattr(module, name, stand_ins[name])
    try:
        yield
    finally:
        for module, name, original in held:
            setattr(module, name, original)


def spec_of_chunk(spec: Any, first: int, layers: int, total: int) -> Any:
    """Of a spec that lists each of ``total`` layers, the part for a chunk of ``layers`` from number ``first``; any
    other spec as it is. Raises ValueError if it lists another number of layers than the model has."""
    if not isinstance(spec, TransformerBlockSubmodules):
        return spec
    listed = spec.layer_specs or []
    if len(listed) != total:
        raise ValueError(
            f"the script's layer specs list {len(listed)} of {total} layers; DIP cuts the model itself and needs all "
            "of them: make them without a pipeline layout, or use --dip-schedule off"
        )
    return replace(spec, layer_specs=listed[first : first + layers])
