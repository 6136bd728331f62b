"""When one rank fails, every rank reports where it was in its plan and exits, so that none hangs."""

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
"""Keys of a watch in the store, where all ranks count: how often a rank has shown that it is alive; how many ranks are
watching; how many have exited normally; how many need the store no more, because they have exited, have failed or have
learned of a failure."""


class Watchdog:
    """Threads that watch a shared store for the first failure of any rank.

    The transport's timeout bounds blocking waits. The watchdog makes other ranks exit within seconds of the first
    failure instead of at their own timeout, and also when the host of the store is gone. If that host is cut off from
    the network, calls to the store don't return; so one thread calls the store, and another counts how long it has had
    no answer.

    A rank that is suspended, or cut off on a host without the store, doesn't report a failure, and others may wait for
    it in collectives of other libraries. So each training rank increases a counter in the store, and the rank before it
    (the last one is before the first) checks that it does.

    The store also disappears with a host that has exited normally, while other ranks still upload logs or write a last
    checkpoint. So a rank that has seen a normal exit ignores failures of the store while it runs no plan.
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
        """Start watching.

        Args:
            store: A ``torch.distributed`` store shared by all ranks.
            position: The progress of this rank, for reports.
            global_rank: This process's global rank.
            ranks: Number of ranks.
            patience_seconds: How long the store may leave a call unanswered, or a training rank may show no sign of
                life.
            interval_seconds: Time between two looks at the store.
            grace_seconds: Time for the main thread to raise its own error before the process exits.
            leave: Ends the process with an exit code.
        """
        self.position = position
        self._store = store
        self._rank = global_rank
        self._next = (global_rank + 1) % ranks
        self._number = 0  # of this watch; a process has one for each model that it has trained
        self._knows = False
        self._counting = threading.Lock()
        self._trains = False
        self._patience = patience_seconds
        self._interval = interval_seconds
        self._grace = grace_seconds
        self._leave = leave
        self._stop = threading.Event()
        self._news = threading.Event()  # There is a cause, a report has been sent, or watching has ended.
        self._failed_here = self._told = False
        self._turn = max(interval_seconds, patience_seconds / 20)
        self._answers = 0  # answers of the store
        self._signs = 0  # signs of life of the next rank
        self._left = False  # whether a rank has exited normally
        self._cause: str | None = None  # the failure that the store reports, or why the store is unreachable
        threading.Thread(target=self._ask, name="dip-watchdog-store", daemon=True).start()
        threading.Thread(target=self._watch, name="dip-watchdog", daemon=True).start()

    def begin(self) -> None:
        """Start to show signs of life, because training starts. Earlier, reading a data set may keep other threads from
        running for arbitrarily long."""
        self._trains = True

    def report(self, error: BaseException) -> None:
        """Tell all ranks that this one has failed; print where it was in its plan, and which rank failed first."""
        text = self._where(error)
        print(f"[dip] stopped at {text}", file=sys.stderr, flush=True)
        self._failed_here = True
        if not self._in_time(self._tell, text):
            print("[dip] could not tell the other ranks: the store's host does not answer", file=sys.stderr, flush=True)
        self._told = True
        self._news.set()

    def close(self) -> None:
        """Stop watching at a normal exit. If the process exits because of an uncaught error, report it to all ranks."""
        if not self._stop.is_set():
            try:
                self._in_time(self._leave_in_order)
            except RuntimeError:  # The interpreter is shutting down and can't start threads.
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
        if uncaught is not None:  # An error outside of any plan, for example in the optimizer.
            text = self._where(uncaught)
            print(f"[dip] stopped at {text}", file=sys.stderr, flush=True)
            self._tell(text)
            return
        with contextlib.suppress(Exception):  # The host of the store may have exited already.
            self._enter()
            self._store.add(self._key(_LEFT), 1)
        self._until_all_know()

    def _until_all_know(self) -> None:
        """On the first rank, which often hosts the store, wait until all other ranks have seen that it exits."""
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
            if first != text:  # Another rank failed first, and this failure is its consequence.
                print(f"[dip] global rank {self._rank}: the first to stop was {first}", file=sys.stderr, flush=True)
            self._until_all_know()
        except Exception as error:
            gone = f"the rank that hosts the store is gone ({type(error).__name__})"
            print(f"[dip] could not tell the other ranks: {gone}", file=sys.stderr, flush=True)

    def _ask(self) -> None:
        counted = self._turn  # Send the first sign of life immediately.
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
                # The host of the store may have exited normally. Then close() is called soon, or when this rank has
                # finished its remaining work; _watch bounds how long that may take.
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
        # Count turns instead of reading a clock: a process that was suspended has asked nobody in the meantime.
        answers, silent, signs, missed = 0, 0, 0, 0
        while True:
            self._news.wait(self._turn)
            if self._stop.is_set():
                return
            silent = silent + 1 if self._answers == answers else 0
            if self._signs != signs or not signs or self._left:  # Without any sign it hasn't begun to train.
                missed = 0
            elif not silent:  # While the store doesn't answer, nothing is known about the next rank.
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
        """Run a call to the store in a thread; return whether it finishes within the grace period."""
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
        # The main thread may be about to raise a more specific error, with a traceback.
        deadline = time.monotonic() + self._grace
        while time.monotonic() < deadline:
            if self._stop.wait(0.1):
                return
        self._leave(1)
