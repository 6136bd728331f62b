"""ms-swift's trainer of Megatron models from the inside."""

from __future__ import annotations

import importlib

from .names import Name, Topic

_BASE = "swift.megatron.trainers.base"
HOOKS = Topic(
    "hooks in ms-swift's trainer",
    "ms-swift",
    "4.6.0",
    "ms-swift's Megatron trainer can't run under DIP",
    (
        Name(f"{_BASE}:BaseMegatronTrainer.prepare_model", ()),
        Name(f"{_BASE}:BaseMegatronTrainer.finalize_training", ()),
        Name(f"{_BASE}:BaseMegatronTrainer", has=("args", "callbacks", "state")),
        Name(f"{_BASE}:get_mcore_model", ("args", "hf_config")),
        Name("swift.megatron.trainers.trainer:MegatronTrainer"),
    ),
)
TESTED = (4, 6)
"""The minor release that the tests cover."""


def swift_version() -> str:
    """The installed ms-swift's. Raises ImportError if there is none."""
    found: str = importlib.import_module("swift.version").__version__
    return found
