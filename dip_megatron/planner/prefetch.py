"""A plan that is asked for before training needs it."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from types import TracebackType

FIRST_PLAN_SECONDS = 0.1
"""For a worker's first plan, once training waits: about what the greedy would take of the trainer instead."""


class Prefetch:
    """Tells the thread that waits for a plan, for as long as it likes, when training begins to wait, too. A context
    manager of the waiting thread."""

    def __init__(self, hurries: bool):
        """``hurries``: once training waits, a worker's first plan will do."""
        self._hurries = hurries
        self._needed: float | None = None
        self._ring, self._bell = socket.socketpair()

    def need(self) -> None:
        """Training waits from now on."""
        self._needed = time.monotonic()
        with contextlib.suppress(OSError):  # closed, if the plan has just come
            self._ring.send(b"!")

    @property
    def bells(self) -> list[socket.socket]:
        """What can be read from once training waits, until :meth:`seconds_left` knows of it."""
        return [self._bell] if self._needed is None else []

    def seconds_left(self, deadline: float, first: bool) -> float:
        """To wait on, as of now. ``deadline`` (seconds of the monotonic clock) is that of the search, ``first`` whether
        its first plan is there."""
        now = time.monotonic()
        if first:
            return 0.0 if self._hurries and self._needed is not None else deadline - now
        if self._needed is None:
            return math.inf
        until = self._needed + FIRST_PLAN_SECONDS
        return (until if self._hurries else max(until, deadline)) - now

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ring.close()
        self._bell.close()
