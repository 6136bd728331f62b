"""The configuration files that ship with the package, and the one way in which every such file is read."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ..core.faults import reason

Schema = TypeVar("Schema", bound=BaseModel)
_SHIPPED = Path(__file__).parents[1] / "configs"


class ConfigurationError(ValueError):
    """Flags or a configuration file that can't be used: the message names place, reason and way out on one line; of a
    file, ``FILE: PLACE: REASON``."""


def shipped(kind: str) -> tuple[str, ...]:
    """Names of the shipped files of one kind: ``models``, ``clusters`` or ``workloads``."""
    return tuple(sorted(p.stem for p in (_SHIPPED / kind).glob("*.yaml")))


def resolve(kind: str, name_or_path: str | Path) -> Path:
    """The file behind a shipped name such as ``vlm-s``, or behind a path. Raises ConfigurationError if it is
    neither.

    A string with a directory separator or a suffix is a path; any other is a shipped name first, then a path.
    """
    path = Path(name_or_path)
    inside = _SHIPPED / kind / f"{path.name}.yaml"
    if path.suffix == "" and len(path.parts) == 1 and inside.is_file():
        return inside
    if path.is_file():
        return path
    raise ConfigurationError(
        f"{name_or_path}: no such file, and not one of the shipped {kind}: {', '.join(shipped(kind))}"
    )


def training_file(name_or_path: str | Path, file: str = "dip.yaml") -> Path:
    """A file for training: ``file`` of a shipped recipe by its name (``vlm-s``), a shipped YAML file by its name
    (``t2v_tiny_cpu``), or a path. Anything with a directory separator or a suffix is a path. Raises ConfigurationError
    for a name of nothing."""
    path, folder = Path(name_or_path), _SHIPPED / "train"
    if path.suffix or len(path.parts) != 1:
        return path
    for inside in (folder / path.name / file, folder / f"{path.name}.yaml", path):
        if inside.is_file():
            return inside
    names = sorted({p.name for p in folder.iterdir() if p.is_dir()} | {p.stem for p in folder.glob("*.yaml")})
    raise ConfigurationError(f"{name_or_path}: no such file, and not one of the shipped: {', '.join(names)}")


def read_yaml(path: Path, schema: type[Schema]) -> Schema:
    """Parse and validate one YAML file. Raises ConfigurationError naming file, place and reason."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path}: {not_yaml(error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: file: {getattr(error, 'strerror', None) or error}") from error
    return validate(str(path), data, schema)


def not_yaml(error: yaml.YAMLError) -> str:
    """``PLACE: REASON`` of a text that is no YAML."""
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}" if mark is not None else "file"
    return f"{place}: not YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}"


def validate(source: str, data: object, schema: type[Schema]) -> Schema:
    """Check already parsed data against a schema. Raises ConfigurationError with the first fault on one line."""
    if not isinstance(data, dict):
        raise ConfigurationError(
            f"{source}: top level: expected a mapping of keys to values, got {type(data).__name__}"
        )
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        faults.sort(
            key=lambda fault: fault["type"] != "extra_forbidden"
        )  # a misspelt key is why another one is missing
        place = ".".join(str(part) for part in faults[0]["loc"]) or "top level"
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ConfigurationError(f"{source}: {place}: {reason(faults[0], schema)}{more}") from error
