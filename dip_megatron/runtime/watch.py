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
_ALIVE, _WATCHING, _LEFT, _KNOWING = "alive", "watching", "left", "knowing"
"""Of a watch, the same one of all ranks: how often a rank has shown to be alive; how many ranks look; how many have
ended in order; how many have, or have failed or heard of a failure, and so need the store no more."""


class Watchdog:
    """Threads that look at a shared store for the first failure of any rank.

    Blocking waits are bounded by the transport's timeout; this makes the others leave within seconds of the first
    failure instead of at their own timeout, and also when the store's host is gone. A host that is cut off says
    nothing: calls of its store just don't return. So one thread asks, another counts how long there has been no answer.
    A rank that is stopped, or on a host that is cut off without the store, says nothing either, and others may wait for
    it in collectives that aren't ours. So each rank that trains counts in the store how often it has looked, and the
    rank before it looks whether it goes on; the last one is before the first.

    A store also goes with a host that has ended in order, while other ranks still upload what they have logged or write
    a last checkpoint. So a rank that knows of such an end has patience with the store, as long as it runs no plan.
    """

    def __init__(
        self,
        store: Any,
        position: Position,
        global_rank: int,
        ranks: int,
        *,
        patience_seconds: float = 600.0,
        interval_seconds: float = 1.0,
        grace_seconds: float = 5.0,
        leave: Callable[[int], None] = os._exit,
    ):
        """``store`` is a torch.distributed store all ``ranks`` share; it may leave a call without an answer, and a rank
        that trains may show no sign of life, for ``patience_seconds``; ``leave`` ends the process."""
        self.position = position
        self._store = store
        self._rank = global_rank
        self._next = (global_rank + 1) % ranks
        self._number = 0  # of this watch; a process that has had several models has had as many
        self._knows = False
        self._counting = threading.Lock()
        self._trains = False
        self._patience = patience_seconds
        self._interval = interval_seconds
        self._grace = grace_seconds
        self._leave = leave
        self._stop = threading.Event()
        self._news = threading.Event()  # a cause, what was told, or the end
        self._failed_here = self._told = False
        self._turn = max(interval_seconds, patience_seconds / 20)
        self._answers = 0  # of the store
        self._signs = 0  # of life, of the next rank
        self._left = False  # whether a rank has ended in order
        self._cause: str | None = None  # that the store tells, or why it tells nothing any more
        threading.Thread(target=self._ask, name="dip-watchdog-store", daemon=True).start()
        threading.Thread(target=self._watch, name="dip-watchdog", daemon=True).start()

    def begin(self) -> None:
        """This rank is about to train: from here on it shows that it is alive. Before, whoever reads a data set may
        leave no other thread a turn for as long as that takes."""
        self._trains = True

    def report(self, error: BaseException) -> None:
        """Tell all ranks that this one failed, and print where it stood, and who failed first."""
        text = self._where(error)
        print(f"[dip] stopped at {text}", file=sys.stderr, flush=True)
        self._failed_here = True
        if not self._in_time(self._tell, text):
            print("[dip] could not tell the other ranks: the store's host does not answer", file=sys.stderr, flush=True)
        self._told = True
        self._news.set()

    def close(self) -> None:
        """End watching, at an orderly shutdown; at one for an error that nobody has caught, tell all ranks of it."""
        if not self._stop.is_set():
            try:
                self._in_time(self._leave_in_order)
            except RuntimeError:  # the interpreter is ending and takes no new threads
                if not self._failed_here:
                    self._leave_in_order()
        self._stop.set()
        self._news.set()

    def _where(self, error: BaseException) -> str:
        first_line = (str(error).splitlines() or [""])[0]
        return f"global rank {self._rank}: {self.position}: {type(error).__name__}: {first_line}"

    def _leave_in_order(self) -> None:
        if self._failed_here:
            return
        uncaught = getattr(sys, "last_value", None)
        if uncaught is not None:  # outside of any plan, in the optimizer for one
            text = self._where(uncaught)
            print(f"[dip] stopped at {text}", file=sys.stderr, flush=True)
            self._tell(text)
            return
        with contextlib.suppress(Exception):  # the host of the store may have ended before
            self._enter()
            self._store.add(self._key(_LEFT), 1)
        self._until_all_know()

    def _until_all_know(self) -> None:
        """The first rank often is the host of the store: those that stay behind have to hear of its end."""
        with contextlib.suppress(Exception):
            self._know()
            until = time.monotonic() + 3 * self._interval
            while self._rank == 0 and time.monotonic() < until:
                if self._store.add(self._key(_KNOWING), 0) >= self._store.add(self._key(_WATCHING), 0):
                    return
                time.sleep(0.05)

    def _know(self) -> None:
        self._enter()
        with self._counting:
            known, self._knows = self._knows, True
        if not known:
            self._store.add(self._key(_KNOWING), 1)

    def _enter(self) -> None:
        with self._counting:
            if not self._number:
                self._number = self._store.add(f"dip/watches/{self._rank}", 1)
                self._store.add(self._key(_WATCHING), 1)

    def _key(self, name: str) -> str:
        return f"dip/{self._number}/{name}"

    def _tell(self, text: str) -> None:
        try:
            first = self._store.compare_set(_KEY, "", text).decode()
            if first != text:  # whose end is all that was seen here
                print(f"[dip] global rank {self._rank}: the first to stop was {first}", file=sys.stderr, flush=True)
            self._until_all_know()
        except Exception as error:
            gone = f"the rank that hosts the store is gone ({type(error).__name__})"
            print(f"[dip] could not tell the other ranks: {gone}", file=sys.stderr, flush=True)

    def _ask(self) -> None:
        counted = self._turn  # the first sign of life comes at once
        while not self._stop.wait(self._interval):
            try:
                self._enter()
                cause = None
                if self._store.check([_KEY]):
                    cause = self._store.get(_KEY).decode()
                    self._know()
                self._left = self._left or self._store.check([self._key(_LEFT)])
                counted += self._interval
                if self._trains and counted >= self._turn:
                    counted = 0.0
                    self._store.add(self._key(f"{_ALIVE}/{self._rank}"), 1)
                    self._signs = self._store.add(self._key(f"{_ALIVE}/{self._next}"), 0)
            except Exception as error:
                # The host of the store may just have ended in order before us; then close() comes soon, or once all is
                # done that this rank has left to do. How long that may take, _watch counts.
                while self._left and self.position.plan is None:
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
        answers, silent, signs, missed = 0, 0, 0, 0
        while True:
            self._news.wait(self._turn)
            if self._stop.is_set():
                return
            silent = silent + 1 if self._answers == answers else 0
            if self._signs != signs or not signs or self._left:  # none: it hasn't begun
                missed = 0
            elif not silent:  # else nothing is known of it
                missed += 1
            answers, signs = self._answers, self._signs
            cause = self._cause
            if cause is None and silent * self._turn > self._patience:
                cause = f"no word from the rank that hosts the store for {self._patience:.0f} s; its host may be gone"
            elif cause is None and missed * self._turn > self._patience and self._next != self._rank:
                cause = (
                    f"no word from global rank {self._next} for {self._patience:.0f} s: it is stopped, or its host or "
                    f"global rank {self._rank}'s is cut off"
                )
                self._in_time(self._tell, cause)
            if cause is not None or self._told:
                self._exit(cause)
                return

    def _in_time(self, call: Callable[..., None], *arguments: Any) -> bool:
        """Whether a call that asks the store comes to its end before this rank loses patience with it."""
        calling = threading.Thread(target=call, args=arguments, name="dip-watchdog-tell", daemon=True)
        calling.start()
        calling.join(self._grace)
        return not calling.is_alive()

    def _exit(self, cause: str | None) -> None:
        if not self._failed_here:
            print(
                f"[dip] global rank {self._rank} stops where it stood: {self.position}; because of {cause}",
                file=sys.stderr,
                flush=True,
            )
        # The main thread may be about to raise a better error of its own, with a traceback.
        deadline = time.monotonic() + self._grace
        while time.monotonic() < deadline:
            if self._stop.wait(0.1):
                return
        self._leave(1)
