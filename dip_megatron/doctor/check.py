"""One finding, and how checks are run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """``LIMITED``: DIP works, without something. ``BROKEN``: DIP can't train here as it is meant to."""

    OK = "ok"
    LIMITED = "limited"
    BROKEN = "broken"


@dataclass(frozen=True)
class Check:
    """What was found of one thing. ``consequence``: what that takes or costs; ``way_out``: what would change it. Both
    are empty where all is well."""

    name: str
    status: Status
    detail: str
    consequence: str = ""
    way_out: str = ""


Checker = Callable[[], Iterable[Check]]


def diagnose(checkers: Sequence[Checker], progress: Callable[[str], object] = lambda _: None) -> list[Check]:
    """Run all of them, silently. One that raises is a broken check of its name: whatever a foreign import may do, the
    others are still told. ``progress`` takes the name of each that begins."""
    found: list[Check] = []
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for checker in checkers:
                name = checker.__name__.replace("_", " ").strip()
                progress(name)
                try:
                    found += checker()
                except Exception as error:
                    found.append(Check(name, Status.BROKEN, f"{type(error).__name__}: {_first_line(error)}"))
    finally:
        logging.disable(before)
    return found


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
