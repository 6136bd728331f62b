"""Passes integers from one process to another through shared memory, without waking the receiver.

Waking another process costs the sender an interrupt to another core, which takes about 0.1 ms on virtual machines. A
sending rank has operations to compute, whereas a waiting rank has time to poll.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Sequence

AVAILABLE = hasattr(os, "eventfd") and hasattr(os, "memfd_create")
"""Whether this system supports shared counters; Linux does."""

_WORD = 8  # bytes of a number, and of the count before the numbers
_APART = 256  # alignment of a counter in bytes, so that no cache line holds parts of two


class SharedCounter:
    """One end of a queue of integers: one process rings numbers, the other takes them in the same order.

    The numbers are in shared memory. An event counter (eventfd) says how many there are. Its system calls also order
    the memory accesses of both processes on any processor: whoever takes a number sees everything that the other
    process wrote before it rang.
    """

    def __init__(self, counter: int, memory: memoryview, most: int):
        """Create one end.

        Args:
            counter: A non-blocking eventfd.
            memory: Shared memory for a count and ``most`` numbers of 8 bytes.
            most: The most numbers that may have been rung and not yet taken.
        """
        self._counter = counter
        self._memory = memory
        self._most = most
        self._count = 0  # numbers rung or taken so far
        self._ready = 0  # numbers not yet taken that the event counter has reported

    def ring(self, number: int) -> None:
        """Add a number between 0 and 2**64 - 1."""
        self._memory[1 + self._count % self._most] = number
        self._count += 1
        self._memory[0] = self._count  # A hint that saves the other end a system call while nothing is new.
        os.eventfd_write(self._counter, 1)

    def take(self) -> int | None:
        """Return the next number, or None if there is none yet."""
        if not self._ready:
            if self._memory[0] == self._count:
                return None
            try:
                self._ready = os.eventfd_read(self._counter)
            except BlockingIOError:
                return None  # The other end has set the hint, but not yet written the event counter.
        number = self._memory[1 + self._count % self._most]
        self._count += 1
        self._ready -= 1
        return number

    def close(self) -> None:
        """Close this end."""
        os.close(self._counter)


def send_counters(connection: socket.socket, head: bytes, count: int, most: int) -> list[SharedCounter]:
    """Create ``count`` counters for at most ``most`` numbers each; send ``head`` and their other ends over a Unix
    socket."""
    counters = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
    memory = os.memfd_create("dip-bells")
    try:
        os.ftruncate(memory, count * _span(most))
        socket.send_fds(connection, [head], [memory, *counters])
        return _bells(memory, counters, most)
    finally:
        os.close(memory)


def receive_counters(connection: socket.socket, head: int, count: int, most: int) -> tuple[bytes, list[SharedCounter]]:
    """Receive what :func:`send_counters` sent: a head of ``head`` bytes and this process's ends of the counters."""
    data, descriptors, _, _ = socket.recv_fds(connection, head, 1 + count, socket.MSG_WAITALL)
    if len(data) < head or len(descriptors) != 1 + count:
        for descriptor in descriptors:
            os.close(descriptor)
        raise ConnectionError("the peer has gone")
    memory, *counters = descriptors
    try:
        return data, _bells(memory, counters, most)
    finally:
        os.close(memory)


def _span(most: int) -> int:
    """Return the bytes of shared memory that one counter occupies."""
    return -(-(1 + most) * _WORD // _APART) * _APART


def _bells(memory: int, counters: Sequence[int], most: int) -> list[SharedCounter]:
    size = _span(most)
    words = memoryview(mmap.mmap(memory, len(counters) * size)).cast("Q")
    each = size // _WORD
    return [SharedCounter(counter, words[i * each : (i + 1) * each], most) for i, counter in enumerate(counters)]
