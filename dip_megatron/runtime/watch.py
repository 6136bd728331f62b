"""When one rank fails, every rank says where it stood and exits; none hangs."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from .executor import Position

_KEY = "dip/failure"
_ALIVE, _WATCHING, _LEFT = "dip/alive", "dip/watching", "dip/left"
"""How often all ranks have looked; how many ranks look; how many have ended in order."""


class Watchdog:
    """Threads that look at a shared store for the first failure of any rank.

    Blocking waits are bounded by the transport's timeout; this makes the others leave within seconds of the first
    failure instead of at their own timeout, and also when the store's host is gone. A host that is cut off says
    nothing: calls of its store just don't return. So one thread asks, another counts how long there has been no answer.
    A rank on that host has its answers, but hears of nobody else: ranks count in the store how often they have looked.

    A store also goes with a host that has ended in order, while other ranks still upload what they have logged or write
    a last checkpoint. So a rank that knows of such an end has patience with the store, as long as it runs no plan.
    """

    def __init__(
        self,
        store: Any,
        position: Position,
        global_rank: int,
        *,
        patience_seconds: float = 600.0,
        interval_seconds: float = 1.0,
        grace_seconds: float = 5.0,
        leave: Callable[[int], None] = os._exit,
    ):
        """``store`` is a torch.distributed store all ranks share, and may leave a call without an answer for
        ``patience_seconds``; ``leave`` ends the process."""
        self._store = store
        self._position = position
        self._rank = global_rank
        self._patience = patience_seconds
        self._interval = interval_seconds
        self._grace = grace_seconds
        self._leave = leave
        self._stop = threading.Event()
        self._news = threading.Event()  # a cause, what was told, or the end
        self._failed_here = self._told = False
        self._turn = max(interval_seconds, patience_seconds / 20)
        self._answers = 0  # of the store
        self._others = 0  # times that others have looked
        self._left = False  # whether a rank has ended in order
        self._cause: str | None = None  # that the store tells, or why it tells nothing any more
        threading.Thread(target=self._ask, name="dip-watchdog-store", daemon=True).start()
        threading.Thread(target=self._watch, name="dip-watchdog", daemon=True).start()

    def report(self, error: BaseException) -> None:
        """Tell all ranks that this one failed, and print where it stood, and who failed first."""
        text = self._where(error)
        print(f"[dip] stopped at {text}", file=sys.stderr, flush=True)
        self._failed_here = True
        telling = threading.Thread(target=self._tell, args=(text,), name="dip-watchdog-tell", daemon=True)
        telling.start()
        telling.join(self._grace)
        if telling.is_alive():
            print("[dip] could not tell the other ranks: the store's host does not answer", file=sys.stderr, flush=True)
        self._told = True
        self._news.set()

    def close(self) -> None:
        """End watching, at an orderly shutdown; at one for an error that nobody has caught, tell all ranks of it."""
        if not self._stop.is_set():
            leaving = threading.Thread(target=self._leave_in_order, name="dip-watchdog-leave", daemon=True)
            try:
                leaving.start()
            except RuntimeError:  # the interpreter is ending and takes no new threads
                if not self._failed_here:
                    self._leave_in_order()
            else:
                leaving.join(self._grace)
        self._stop.set()
        self._news.set()

    def _where(self, error: BaseException) -> str:
        first_line = (str(error).splitlines() or [""])[0]
        return f"global rank {self._rank}: {self._position}: {type(error).__name__}: {first_line}"

    def _leave_in_order(self) -> None:
        if self._failed_here:
            return
        uncaught = getattr(sys, "last_value", None)
        if uncaught is not None:  # outside of any plan, in the optimizer for one
            self._tell(self._where(uncaught))
            return
        with contextlib.suppress(Exception):  # the host of the store may have ended before
            left = self._store.add(_LEFT, 1)
            until = time.monotonic() + 3 * self._interval
            # The first rank often is the host of the store: those that stay behind have to hear of its end.
            while self._rank == 0 and left < self._store.add(_WATCHING, 0) and time.monotonic() < until:
                time.sleep(0.05)
                left = self._store.add(_LEFT, 0)

    def _tell(self, text: str) -> None:
        try:
            first = self._store.compare_set(_KEY, "", text).decode()
            if first != text:  # whose end is all that was seen here
                print(f"[dip] global rank {self._rank}: the first to stop was {first}", file=sys.stderr, flush=True)
        except Exception as error:
            print(f"[dip] could not tell the other ranks: {error}", file=sys.stderr, flush=True)

    def _ask(self) -> None:
        own, counted = 0, 0.0
        while not self._stop.wait(self._interval):
            try:
                if not self._answers:
                    self._store.add(_WATCHING, 1)
                cause = self._store.get(_KEY).decode() if self._store.check([_KEY]) else None
                self._left = self._left or self._store.check([_LEFT])
                counted += self._interval
                if counted >= self._turn:
                    own, counted = own + 1, 0.0
                    self._others = self._store.add(_ALIVE, 1) - own
            except Exception as error:
                # The host of the store may just have ended in order before us; then close() comes soon, or once all is
                # done that this rank has left to do. How long that may take, _watch counts.
                while self._left and self._position.plan is None:
                    if self._stop.wait(self._interval):
                        return
                if self._stop.wait(self._grace):
                    return
                cause = f"the rank that hosts the store is gone ({type(error).__name__})"
            self._answers += 1
            if cause is not None:
                self._cause = cause
                self._news.set()
                return

    def _watch(self) -> None:
        # Counted in own turns, not on the clock: a process that was stopped for a while has asked nobody meanwhile.
        answers, silent, others, lonely = 0, 0, 0, 0
        while True:
            self._news.wait(self._turn)
            if self._stop.is_set():
                return
            silent = silent + 1 if self._answers == answers else 0
            alone = not silent and 0 < self._others == others and not self._left  # none: the others haven't begun
            lonely = lonely + 1 if alone else 0
            answers, others = self._answers, self._others
            cause = self._cause
            if cause is None and silent * self._turn > self._patience:
                cause = f"no word from the rank that hosts the store for {self._patience:.0f} s; its host may be gone"
            elif cause is None and lonely * self._turn > self._patience:
                cause = f"no word from any other rank for {self._patience:.0f} s; this rank's host may be cut off"
            if cause is not None or self._told:
                self._exit(cause)
                return

    def _exit(self, cause: str | None) -> None:
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
