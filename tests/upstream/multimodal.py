"""Megatron-LM's ``examples/multimodal/train.py`` on CPU ranks: its models cut down to what a test has time for."""

from __future__ import annotations

import builtins
import functools
import importlib
import os
from typing import Any

SIZES = {
    "get_language_model_config": {"ffn_hidden_size": 128},
    "get_vision_model_config": {
        "num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 4,
        "kv_channels": 12,
    },
    "get_vision_projection_config": {"ffn_hidden_size": 96},
}  # fmt: skip
"""By function of the example's ``config.py``, what it returns otherwise: there, sizes are those of published models."""


def cut_down() -> None:
    """Let the example's functions make small models. Its folder is on the import path."""
    config = importlib.import_module("config")
    for name, sizes in SIZES.items():
        setattr(config, name, _with(getattr(config, name), sizes))


def _with(make: Any, sizes: dict[str, int]) -> Any:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        found = make(*args, **kwargs)
        for name, value in sizes.items():
            setattr(found, name, value)
        return found

    return made


def mend() -> None:
    """Complete what the example has missed while Megatron-LM changed: main's doesn't start as it is (d98e8a64)."""
    import megatron.training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    # It reads its data loader's state as if that were nothing but tensors, which Energon's is not: from torch 2.6 on it
    # says so, and begins the data anew.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    pretrain = megatron.training.pretrain
    # It names this function and doesn't import it, nor does it give pretrain() what that returns.
    builtins.pretrain_cfg_container_from_args = pretrain_cfg_container_from_args  # type: ignore[attr-defined]

    def completed(*args: Any, **kwargs: Any) -> Any:
        given = megatron.training.get_args()
        # Its model asks for a flag that only other scripts have.
        given.vision_projection_type = getattr(given, "vision_projection_type", "mlp")
        return pretrain(pretrain_cfg_container_from_args(given), *args, **kwargs)

    megatron.training.pretrain = completed
