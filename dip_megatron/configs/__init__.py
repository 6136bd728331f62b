"""The configuration files that ship with the package, and the one way in which every such file is read."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Schema = TypeVar("Schema", bound=BaseModel)
_HERE = Path(__file__).parent


class ConfigError(ValueError):
    """A configuration file that can't be used; the message is ``FILE: PLACE: REASON`` on one line."""


def shipped(kind: str) -> tuple[str, ...]:
    """Names of the shipped files of one kind: ``models``, ``clusters`` or ``workloads``."""
    return tuple(sorted(p.stem for p in (_HERE / kind).glob("*.yaml")))


def resolve(kind: str, name_or_path: str | Path) -> Path:
    """The file behind a shipped name such as ``vlm-s``, or behind a path. Raises ConfigError if there is neither.

    A string with a directory separator or a suffix is a path; any other is a shipped name first, then a path.
    """
    path = Path(name_or_path)
    inside = _HERE / kind / f"{path.name}.yaml"
    if path.suffix == "" and len(path.parts) == 1 and inside.is_file():
        return inside
    if path.is_file():
        return path
    raise ConfigError(f"{name_or_path}: no such file, and not one of the shipped {kind}: {', '.join(shipped(kind))}")


def read_yaml(path: Path, schema: type[Schema]) -> Schema:
    """Parse and validate one YAML file. Raises ConfigError naming file, place and reason."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}" if mark is not None else "file"
        raise ConfigError(f"{path}: {place}: {getattr(error, 'problem', None) or 'not YAML'}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: file: {error}") from error
    return validate(str(path), data, schema)


def validate(source: str, data: object, schema: type[Schema]) -> Schema:
    """Check already parsed data against a schema. Raises ConfigError with the first fault on one line."""
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: top level: expected a mapping of keys to values, got {type(data).__name__}")
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        place = ".".join(str(part) for part in faults[0]["loc"]) or "top level"
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        reason = faults[0]["msg"].removeprefix("Value error, ").replace("\n", " ")
        raise ConfigError(f"{source}: {place}: {reason}{more}") from error
