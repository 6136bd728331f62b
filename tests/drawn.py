"""How many examples of a property are drawn: few in ``scripts/test``, many in ``scripts/deep_test``."""

from __future__ import annotations

import os
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase

DEEP = os.environ.get("DIP_DEEP") == "1"
FACTOR = 50 if DEEP else 1


def settings(max_examples: int = 100, **options: Any) -> hypothesis.settings:
    """``hypothesis.settings`` for so many examples, the same in every run, whatever time they take; a deep run draws
    more of them, and other ones each time."""
    options |= {"derandomize": not DEEP, "deadline": None}
    return hypothesis.settings(max_examples=max_examples * FACTOR, **options)


def settings_of_ranks(max_examples: int) -> hypothesis.settings:
    """:func:`settings` for examples that several processes run: each takes its time, and a failure isn't made smaller,
    which would run hundreds more."""
    return settings(max_examples, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])
