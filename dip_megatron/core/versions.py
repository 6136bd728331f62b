"""Reading files of an earlier version, whose fields had other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_version(data: Any, version: int) -> bool:
    """Whether a file's content says that it is of ``version``: a whole number, not ``true`` or ``1.0``."""
    return isinstance(data, dict) and type(data.get("version")) is int and data["version"] == version


def renamed(data: Any, names: Mapping[str, str]) -> Any:
    """``data`` with its fields under their new ``names``; a list's items each. A field that is there under both names
    stays, to be refused, and so does what is no object."""
    if isinstance(data, list):
        return [renamed(item, names) if isinstance(item, dict) else item for item in data]
    if not isinstance(data, dict):
        return data
    return {names[key] if key in names and names[key] not in data else key: value for key, value in data.items()}
