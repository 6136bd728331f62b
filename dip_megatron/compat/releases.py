"""Which Megatron-Core is installed, and whether it has a training loop."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


def megatron_version() -> str:
    """The installed Megatron-Core's. Raises ImportError if there is none."""
    found: str = importlib.import_module("megatron.core.package_info").__version__
    return found


def has_training_loop() -> bool:
    """Whether ``megatron.training`` can be found: wheels before 0.17 don't bring it, a checkout does."""
    return importlib.util.find_spec("megatron.training") is not None


def training_loop() -> ModuleType:
    """``megatron.training``. Raises ImportError, also for what it imports itself."""
    return importlib.import_module("megatron.training")
