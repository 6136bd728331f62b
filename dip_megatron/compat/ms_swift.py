"""ms-swift's trainer of Megatron models from the inside."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
        Name(f"{_BASE}:prepare_mcore_model", ("args", "model")),
        Name("swift.megatron.utils.utils:get_target_modules", ("args", "model")),
        Name("peft.utils.constants:DUMMY_TARGET_MODULES"),
        Name("swift.megatron.trainers.trainer:MegatronTrainer"),
    ),
)
TESTED = (4, 6)
"""The minor release that the tests cover."""


def swift_version() -> str:
    """The installed ms-swift's. Raises ImportError if there is none."""
    found: str = importlib.import_module("swift.version").__version__
    return found


@contextmanager
def adapters_of(args: Any, chunk: Any) -> Iterator[None]:
    """Within, ms-swift's arguments ask for adapters where ``chunk`` has layers for them. PEFT refuses a model that has
    none, as chunks of an encoder that stays as it is; of a target by that name it wants no match."""
    asked = args.target_modules
    found = importlib.import_module("swift.megatron.utils.utils").get_target_modules(args, chunk)
    names = [name for name, _ in chunk.named_modules() if name]
    if isinstance(found, str):
        matches = any(re.fullmatch(found, name) for name in names)
    else:
        matches = any(name == target or name.endswith(f".{target}") for name in names for target in found)
    if not matches:
        args.target_modules = importlib.import_module("peft.utils.constants").DUMMY_TARGET_MODULES
    try:
        yield
    finally:
        args.target_modules = asked
