"""How a public name goes: it works and warns for one minor version, then it is gone."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Deprecated:
    """A public name that is about to go. ``since``: the minor version in which it began to warn (``"0.2"``); ``use``:
    what to write instead."""

    name: str
    since: str
    use: str

    @property
    def gone_in(self) -> str:
        """The minor version that doesn't have it any more."""
        major, minor = numbers(self.since)
        return f"{major}.{minor + 1}"

    def warn(self, stacklevel: int = 3) -> None:
        """Tell the caller of the caller."""
        warnings.warn(
            f"dip_megatron.{self.name} is deprecated since {self.since} and gone in {self.gone_in}; use {self.use}",
            DeprecationWarning,
            stacklevel,
        )


def numbers(version: str) -> tuple[int, int]:
    """Major and minor number."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def deprecated(since: str, use: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Let a public function warn when it is called."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        notice = Deprecated(function.__name__, since, use)

        @functools.wraps(function)
        def warning(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            notice.warn()
            return function(*args, **kwargs)

        return warning

    return decorate


def moved(old: str, table: dict[str, Deprecated], find: Callable[[str], Any]) -> Any:
    """The object behind an old name of ``table``, found under the new one (its ``use``). Raises KeyError."""
    notice = table[old]
    notice.warn(stacklevel=4)
    return find(notice.use.removeprefix("dip_megatron."))
