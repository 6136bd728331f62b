"""Where a run's settings come from: flags over the environment, over the YAML file, over the defaults.

Of every setting in :class:`dip_megatron.config.DipConfig` there is a variable, ``DIP_`` and its name in capitals
(``DIP_SCHEDULE``, ``DIP_SEARCH_BUDGET``; ``DIP_MODULES`` holds YAML), and ``DIP_CONFIG`` names the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .config import DipConfig
from .core.faults import nearest
from .describe.files import ConfigurationError

FLAG, ENVIRONMENT, FILE, DEFAULT = "flag", "environment", "file", "default"


@dataclass(frozen=True)
class Settings:
    """``origins``: where each setting's value is from, ``flag``, ``environment``, ``file`` or ``default``; ``path`` of
    the file, if there is one."""

    config: DipConfig
    origins: Mapping[str, str]
    path: Path | None


def variable(setting: str) -> str:
    """The environment's name of a setting."""
    return f"DIP_{setting.upper()}"


def load_settings(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Settings:
    """All settings of a run. ``flags`` by setting, None where one is not given; ``config`` among them names the file.

    Raises ConfigurationError in one line that names the flag's setting, the variable or the file.
    """
    given = {name: value for name, value in flags.items() if value is not None and name != "config"}
    found = _from_environment(environ)
    path = flags.get("config") or environ.get("DIP_CONFIG") or None
    path = None if path is None else Path(path)
    config = DipConfig.load(path, {**found, **given})
    origins = {
        name: FLAG if name in given
        else ENVIRONMENT if name in found
        else FILE if name in config.model_fields_set
        else DEFAULT
        for name in DipConfig.model_fields
    }  # fmt: skip
    return Settings(config, origins, path)


def offers(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> dict[str, dict[str, Any]]:
    """For each setting the values that flags, environment, file and defaults have for it, by origin: the first one is
    the run's, the others have lost to it. ``flags`` as in :func:`load_settings`, which raises the same errors."""
    settings = load_settings(flags, environ)
    sources = {
        FLAG: load_settings({name: value for name, value in flags.items() if name != "config"}, {}).config,
        ENVIRONMENT: load_settings({}, {name: value for name, value in environ.items() if name != "DIP_CONFIG"}).config,
        FILE: DipConfig.load(settings.path, {}),
    }
    found = {}
    for name in DipConfig.model_fields:
        found[name] = {
            origin: getattr(config, name) for origin, config in sources.items() if name in config.model_fields_set
        }
        found[name][DEFAULT] = getattr(DipConfig(), name)
        assert next(iter(found[name])) == settings.origins[name]
    return found


def asks(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for a schedule of DIP's, or for Megatron's with microbatches in an order of DIP's,
    as far as can be told before a loop's own flags are read.

    Raises ConfigurationError.
    """
    _refuse_misspelt(environ)
    if not any(variable(name) in environ for name in ("schedule", "plan_file", "pairing", "config")):
        return False
    config = load_settings({}, environ).config
    return config.on or config.pairs


def _refuse_misspelt(environ: Mapping[str, str]) -> None:
    """Raises ConfigurationError for a variable that is almost a setting's, and would do nothing without a word."""
    known = [variable(name) for name in (*DipConfig.model_fields, "config")]
    for name in environ:
        meant = nearest(name, known) if name.startswith("DIP_") else None
        if meant is not None:
            raise ConfigurationError(f"{name}: no such variable; did you mean {meant}?")


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    _refuse_misspelt(environ)
    found: dict[str, Any] = {}
    for name in DipConfig.model_fields:
        text = environ.get(variable(name))
        if text is None or text == "":
            continue
        try:
            found[name] = yaml.safe_load(text) if name == "modules" else text
            DipConfig.load(None, {name: found[name]})
        except (yaml.YAMLError, ConfigurationError) as error:
            reason = str(error).removeprefix("flags: ").splitlines()[0]
            raise ConfigurationError(f"{variable(name)}={text}: {reason}") from error
    return found
