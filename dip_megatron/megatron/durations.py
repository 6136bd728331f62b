"""How long an iteration takes, by those before it."""

from __future__ import annotations

import time
from collections import deque

_REMEMBERED = 2


class Durations:
    """Of the last training iterations. The shortest counts: one that waited for data, or for a host that was busy, says
    nothing of the next, whose plan would then be searched for long after it is needed."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    def add(self, seconds: float) -> None:
        """One has ended that took so long."""
        self._seconds.append(seconds)

    def left(self, began: float) -> float:
        """Seconds until an iteration is expected to end that ``began`` then (``time.perf_counter()``); less than 0 once
        it takes longer, and before the first has ended."""
        return min(self._seconds, default=0.0) - (time.perf_counter() - began)
