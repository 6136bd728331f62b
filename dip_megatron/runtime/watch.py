"""When one rank fails, every rank says where it stood and exits; none hangs."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from .executor import Position

_KEY = "dip/failure"


class Watchdog:
    """A thread that looks at a shared store for the first failure of any rank.

    Blocking waits are bounded by the transport's timeout; this thread makes the others leave within seconds of the
    first failure instead of at their own timeout, and also when the store's host is gone.
    """

    def __init__(
        self,
        store: Any,
        position: Position,
        global_rank: int,
        *,
        interval_seconds: float = 1.0,
        grace_seconds: float = 5.0,
        leave: Callable[[int], None] = os._exit,
    ):
        """``store`` is a torch.distributed store all ranks share; ``leave`` ends the process."""
        self._store = store
        self._position = position
        self._rank = global_rank
        self._interval = interval_seconds
        self._grace = grace_seconds
        self._leave = leave
        self._stop = threading.Event()
        self._failed_here = False
        self._thread = threading.Thread(target=self._watch, name="dip-watchdog", daemon=True)
        self._thread.start()

    def report(self, error: BaseException) -> None:
        """Tell all ranks that this one failed, and print where it stood."""
        self._failed_here = True
        first_line = (str(error).splitlines() or [""])[0]
        text = f"global rank {self._rank}: {self._position}: {type(error).__name__}: {first_line}"
        print(f"[dip] stopped at {text}", file=sys.stderr, flush=True)
        try:
            self._store.compare_set(_KEY, "", text)
        except Exception as store_error:
            print(f"[dip] could not tell the other ranks: {store_error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End watching, at an orderly shutdown."""
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                failed = self._store.check([_KEY])
                cause = self._store.get(_KEY).decode() if failed else ""
            except Exception as error:
                # The host of the store may just have ended in order before us; then close() comes soon.
                if self._stop.wait(self._grace):
                    return
                failed, cause = True, f"the rank that hosts the store is gone ({type(error).__name__})"
            if failed:
                self._exit(cause)
                return

    def _exit(self, cause: str) -> None:
        if not self._failed_here:
            print(
                f"[dip] global rank {self._rank} stops where it stood: {self._position}; because of {cause}",
                file=sys.stderr,
                flush=True,
            )
        # The main thread may be about to raise a better error of its own, with a traceback.
        deadline = time.monotonic() + self._grace
        while time.monotonic() < deadline:
            if self._stop.wait(0.1):
                return
        self._leave(1)
