"""Megatron-Core's MimoModel, one chunk of its language model at a time."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType
from typing import Any

from .names import Name, Topic

_PACKAGE = "megatron.core.models.mimo"
_ROLE = f"{_PACKAGE}.config.role"
_MODEL = f"{_PACKAGE}.model.base:MimoModel"
_SUBMODULES = f"{_PACKAGE}.submodules.base:ModalitySubmodules"
_FIRST = "0.19"
TOPIC = Topic(
    "MIMO models",
    "megatron-core",
    "0.19.2",
    "Megatron-Core's MimoModel can't be trained under DIP",
    (
        Name(f"{_ROLE}:MIMO_LANGUAGE_MODULE_KEY", first=_FIRST),
        Name(f"{_ROLE}:ModuleLayout.NON_COLOCATED", first=_FIRST),
        Name(f"{_ROLE}:ModuleStageInfo", ("is_first_stage", "is_last_stage"), first=_FIRST),
        Name(f"{_ROLE}:RankRole", ("modules", "mode"), first=_FIRST),
        Name(_MODEL, ("mimo_config", "cp_group", "tp_group"), first=_FIRST,
             has=("role", "input_tensors", "modality_submodules", "language_model")),
        Name(f"{_PACKAGE}.config.base_configs:MimoModelConfig", first=_FIRST,
             has=("language_model_spec", "modality_submodules_spec", "special_token_ids", "module_to_grid_map")),
        Name(f"{_SUBMODULES}.forward", ("encoder_inputs",), first=_FIRST),
        Name(_SUBMODULES, has=("encoders", "input_projections"), first=_FIRST),
        Name(
            "megatron.core.models.vision.clip_vit_model:CLIPViTModel", first=_FIRST,
            has=("conv1", "position_embeddings", "class_token", "ln_pre", "ln_post", "decoder"),
        ),
    ),
)  # fmt: skip


def mimo() -> ModuleType | None:
    """Megatron-Core's package of it; None where a part of the model can't be told that it is one, before 0.19. It warns
    that it is experimental when it is imported, which is the business of scripts that use it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        # Looking for a module imports the packages around it.
        if importlib.util.find_spec(_PACKAGE) is None or importlib.util.find_spec(_ROLE) is None:
            return None
        return importlib.import_module(_PACKAGE)


def stand(model: Any, first: bool, last: bool) -> None:
    """Let ``model``, which has no encoders, be a stage of its language model alone, as it is where Megatron gives
    encoders ranks of their own."""
    role = importlib.import_module(_ROLE)
    stage = role.ModuleStageInfo(is_first_stage=first, is_last_stage=last)
    model.role = role.RankRole({role.MIMO_LANGUAGE_MODULE_KEY: stage}, role.ModuleLayout.NON_COLOCATED)


def hand(model: Any, embeddings: dict[str, Any], hidden: Any = None) -> None:
    """Give such a stage what stages before it have made: embeddings ``[tokens, h]`` of each modality, or hidden states
    ``[s, b, h]``. With nothing, it lets go of what it had."""
    key = importlib.import_module(_ROLE).MIMO_LANGUAGE_MODULE_KEY
    model.input_tensors = embeddings if hidden is None else {key: hidden}


def hidden_of(output: Any) -> Any:
    """Hidden states in what a stage returns that isn't the last."""
    return output[0][importlib.import_module(_ROLE).MIMO_LANGUAGE_MODULE_KEY]
