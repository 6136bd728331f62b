"""Other cores kept as busy as this one: cores share memory and caches, and ranks that train keep all of theirs busy."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def busy_neighbours(count: int, work: Callable[[], object]) -> Iterator[None]:
    """Within, ``count`` copies of this process repeat ``work``, as long as it lives."""
    here = os.getpid()
    copies = []
    try:
        for _ in range(count):
            copy = os.fork()
            if not copy:
                _repeat(work, here)
            copies.append(copy)
        yield
    finally:
        for copy in copies:
            with suppress(ProcessLookupError):
                os.kill(copy, signal.SIGKILL)
            os.waitpid(copy, 0)


def _repeat(work: Callable[[], object], parent: int) -> None:
    try:
        while os.getppid() == parent:
            work()
    finally:
        os._exit(0)  # nothing of the parent's is cleaned up here
