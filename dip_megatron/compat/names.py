"""Names that others may change without notice, written down so that each can be looked for.

Every file beside this one has a :class:`Topic`: the names it leans on, the releases they were seen in, and what is lost
without them. ``dip doctor`` prints them for the environment it runs in, and a test asserts them in every environment
the project is tested with.
"""

from __future__ import annotations

import dis
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any, Literal

Package = Literal[
    "megatron-core", "megatron.training", "transformer-engine", "megatron-bridge", "mcore-bridge", "ms-swift",
    "mcore-adapter", "roll", "torch",
]  # fmt: skip


@dataclass(frozen=True)
class Name:
    """One name: ``module:attribute`` or ``module:Class.attribute``.

    ``takes`` lists the parameters that DIP gives: those before ``"*"`` by position, in this order and from the first,
    those after it by name. ``has`` lists attributes of a class's instances. ``first`` and ``last`` are the oldest and
    the newest release it was seen in, where it isn't in all that are supported (``""``).
    """

    path: str
    takes: tuple[str, ...] | None = None
    has: tuple[str, ...] = ()
    first: str = ""
    last: str = ""


@dataclass(frozen=True)
class Topic:
    """What some names are for. ``lost``: in a sentence, what DIP can't do where one of them is missing. ``seen``: the
    releases of ``package`` with which they were seen."""

    title: str
    package: Package
    seen: str
    lost: str
    names: tuple[Name, ...] = field(default=())


def fault(name: Name) -> str | None:
    """What is wrong with a name here, in a few words, or None. Imports its module; raises nothing."""
    try:
        found = find(name.path)
    except (ImportError, AttributeError) as error:
        return f"{name.path} is missing ({error})"
    missing = [attribute for attribute in name.has if attribute not in set(_attributes(found))]
    if missing:
        return f"{name.path} has no {', no '.join(missing)}"
    return None if name.takes is None else _refused(name.path, found, name.takes)


def find(path: str) -> Any:
    """What ``module:attribute.attribute`` names. Raises ImportError or AttributeError."""
    module, _, attributes = path.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in filter(None, attributes.split(".")):
        found = getattr(found, attribute)
    return found


def being_imported(module: ModuleType) -> bool:
    """Whether a module is in ``sys.modules`` and not yet through: importlib tells it in no public way."""
    return bool(getattr(module.__spec__, "_initializing", False))


def in_releases(name: Name, version: str) -> bool:
    """Whether a release of its package is one of those that are expected to have the name."""
    here = _numbers(version)
    return (not name.first or _numbers(name.first) <= here) and (not name.last or here <= _numbers(name.last))


def _numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split(".")[:2]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _refused(path: str, found: Any, takes: tuple[str, ...]) -> str | None:
    parameters = inspect.signature(found).parameters
    names = list(parameters)
    if names[:1] == ["self"]:
        names = names[1:]
    star = takes.index("*") if "*" in takes else len(takes)
    positional, keywords = takes[:star], takes[star + 1 :]
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL not in kinds and tuple(names[: len(positional)]) != positional:
        return f"{path} takes ({', '.join(names)}), not ({', '.join(positional)}) first"
    unknown = [keyword for keyword in keywords if keyword not in names]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        return f"{path} doesn't take {', '.join(unknown)}"
    return None


def _attributes(cls: Any) -> Iterator[str]:
    """Names of a class, its fields, and what its methods assign."""
    yield from dir(cls)
    for base in inspect.getmro(cls):
        yield from inspect.get_annotations(base)
        for value in vars(base).values():
            function = inspect.unwrap(value) if callable(value) else value
            if isinstance(function, FunctionType):
                yield from (i.argval for i in dis.get_instructions(function) if i.opname == "STORE_ATTR")
