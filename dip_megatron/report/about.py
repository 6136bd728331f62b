"""Settings and versions of a run, for people who read its report later."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from ..config import DipConfig

_DISTRIBUTIONS = ("dip_megatron", "megatron-core", "megatron-bridge", "torch", "transformer-engine", "numpy", "numba")


def about_run(config: DipConfig) -> dict[str, dict[str, object]]:
    """What ``run.json`` holds: every setting by its name, and the versions of what ran."""
    versions: dict[str, object] = {"python": platform.python_version(), "system": platform.platform()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    versions["host cores"] = os.cpu_count()
    return {"settings": config.model_dump(mode="json"), "versions": versions}
