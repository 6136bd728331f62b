"""All schedules by name: the ones that come with the package, and those that other packages bring.

A package brings one through the entry-point group ``dip_megatron.schedules``::

    [project.entry-points."dip_megatron.schedules"]
    largest-first = "my_package.schedules:LARGEST_FIRST"

Names are known without loading anything; an entry is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .entry import ScheduleEntry

GROUP = "dip_megatron.schedules"
ALIASES = {"dynamic": "dip", "static": "segmented-static"}
"""Names for what most runs want."""
_BUILT_IN = {
    "dip": "DIP",
    "dip-paper": "DIP_PAPER",
    "megatron-1f1b": "MEGATRON_1F1B",
    "megatron-interleaved": "MEGATRON_INTERLEAVED",
    "megatron-parameter-balanced": "MEGATRON_PARAMETER_BALANCED",
    "zb-h1": "ZB_H1",
    "zb-v": "ZB_V",
    "optimus": "OPTIMUS",
    "nnscaler": "NNSCALER",
    "segmented-static": "SEGMENTED_STATIC",
    "encoder-first-stage": "ENCODER_FIRST_STAGE",
    "encoders-first": "ENCODERS_FIRST",
    "bigmac": "BIGMAC",
    "disttrain": "DISTTRAIN",
}
_registered: dict[str, ScheduleEntry] = {}


class UnknownScheduleError(ValueError):
    """No schedule has that name, or it can't be loaded; the message says what there is, or why not."""


def schedule_names() -> tuple[str, ...]:
    """Names of all entries, those of this package first; aliases are not among them."""
    return tuple(dict.fromkeys((*_BUILT_IN, *_registered, *_foreign())))


def find_schedule(name: str) -> ScheduleEntry:
    """The entry of that name or alias. Raises UnknownScheduleError."""
    name = ALIASES.get(name, name)
    if name in _BUILT_IN:
        entry: ScheduleEntry = getattr(importlib.import_module(".entries", __package__), _BUILT_IN[name])
        return entry
    if name in _registered:
        return _registered[name]
    point = _foreign().get(name)
    if point is None:
        raise UnknownScheduleError(
            f"unknown schedule {name!r}; choose one of {', '.join((*ALIASES, *schedule_names()))}"
        )
    return _loaded(point)


def register_schedule(entry: ScheduleEntry) -> None:
    """Add an entry for this process (a script's own schedule). Raises ValueError if its name is another's."""
    if entry.name in (*ALIASES, *_BUILT_IN, "off") or _registered.get(entry.name, entry) is not entry:
        raise ValueError(f"there is a schedule {entry.name!r} already; give yours another name")
    _registered[entry.name] = entry


def check_name(name: str) -> None:
    """Raise UnknownScheduleError unless a schedule has that name or alias; loads nothing."""
    if name not in ALIASES and name not in _BUILT_IN and name not in schedule_names():
        raise UnknownScheduleError(
            f"unknown schedule {name!r}; choose one of {', '.join((*ALIASES, *schedule_names()))}"
        )


@lru_cache(maxsize=1)
def _foreign() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


@lru_cache(maxsize=64)
def _loaded(point: EntryPoint) -> ScheduleEntry:
    from .entry import ScheduleEntry

    try:
        entry = point.load()
    except Exception as error:  # whatever another package's import may raise
        raise UnknownScheduleError(
            f"schedule {point.name!r} ({point.value}) can't be loaded: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(entry, ScheduleEntry) or entry.name != point.name:
        raise UnknownScheduleError(
            f"schedule {point.name!r} ({point.value}) must be a ScheduleEntry of that name, it is {entry!r}"
        )
    return entry
