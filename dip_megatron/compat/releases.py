"""Which Megatron-Core is installed, and whether it has a training loop."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

TESTED = ((0, 16), (0, 19))
"""The oldest and the newest minor release that the tests cover; README.md lists them."""


def megatron_version() -> str:
    """The installed Megatron-Core's. Raises ImportError if there is none."""
    found: str = importlib.import_module("megatron.core.package_info").__version__
    return found


def version_numbers() -> tuple[int, int]:
    """Major and minor number of the installed Megatron-Core."""
    return numbers_of(megatron_version())


def numbers_of(version: str) -> tuple[int, int]:
    """Major and minor number of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def has_training_loop() -> bool:
    """Whether ``megatron.training`` can be found: wheels before 0.17 don't bring it, a checkout does."""
    return importlib.util.find_spec("megatron.training") is not None


def training_loop() -> ModuleType:
    """``megatron.training``. Raises ImportError, also for what it imports itself."""
    return importlib.import_module("megatron.training")


def training_loop_fault() -> str | None:
    """Why ``megatron.training`` can't be imported, in a line; None if it can."""
    try:
        for name in ("arguments", "checkpointing", "training"):
            importlib.import_module(f"megatron.training.{name}")
    except Exception as error:  # whatever a foreign import may raise
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None
