"""Whole numbers that one process rings out to another, through memory that both map, without waking it.

Waking a process costs the one that wakes it: an interrupt to another core, on virtual machines a tenth of a
millisecond. A rank that waits has time, so it looks again and again; the rank that rings has a stage to compute.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Sequence

AVAILABLE = hasattr(os, "eventfd") and hasattr(os, "memfd_create")
"""Whether this system has what bells are made of (Linux has)."""

_WORD = 8  # bytes of a number, and of the count before them
_APART = 256  # bytes between two bells: no cache line holds parts of both


class SharedCounter:
    """One end of a bell: the one rings numbers, the other takes them, in the same order.

    The numbers are in shared memory. The event counter says how many there are, and orders the accesses of both ends
    to memory, whatever the processor: who takes a number sees all that the other wrote before it rang.
    """

    def __init__(self, counter: int, memory: memoryview, most: int):
        """``counter`` is an eventfd that doesn't block, ``memory`` has room for a count and ``most`` numbers, the most
        that may have been rung and not taken."""
        self._counter = counter
        self._memory = memory
        self._most = most
        self._count = 0  # numbers rung or taken so far
        self._ready = 0  # of those not taken, how many the event counter has told

    def ring(self, number: int) -> None:
        """Leave a number, of 0 to 2**64 - 1."""
        self._memory[1 + self._count % self._most] = number
        self._count += 1
        self._memory[0] = self._count  # a hint for the other end, which saves it a system call
        os.eventfd_write(self._counter, 1)

    def take(self) -> int | None:
        """The next number, None if there is none yet."""
        if not self._ready:
            if self._memory[0] == self._count:
                return None
            try:
                self._ready = os.eventfd_read(self._counter)
            except BlockingIOError:
                return None  # the other end is about to ring
        number = self._memory[1 + self._count % self._most]
        self._count += 1
        self._ready -= 1
        return number

    def close(self) -> None:
        """This end is used no more."""
        os.close(self._counter)


def send_counters(connection: socket.socket, head: bytes, count: int, most: int) -> list[SharedCounter]:
    """Make bells for at most ``most`` numbers each, and send ``head`` and their other ends over a Unix socket."""
    counters = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
    memory = os.memfd_create("dip-bells")
    try:
        os.ftruncate(memory, count * _span(most))
        socket.send_fds(connection, [head], [memory, *counters])
        return _bells(memory, counters, most)
    finally:
        os.close(memory)


def receive_counters(connection: socket.socket, head: int, count: int, most: int) -> tuple[bytes, list[SharedCounter]]:
    """What :func:`send_counters` sends: ``head`` bytes, and this process's ends of the counters."""
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
    """Bytes of one bell's memory."""
    return -(-(1 + most) * _WORD // _APART) * _APART


def _bells(memory: int, counters: Sequence[int], most: int) -> list[SharedCounter]:
    size = _span(most)
    words = memoryview(mmap.mmap(memory, len(counters) * size)).cast("Q")
    each = size // _WORD
    return [SharedCounter(counter, words[i * each : (i + 1) * each], most) for i, counter in enumerate(counters)]
