"""Measures when every operation starts and ends, without synchronizing the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..core import Operation, Unit


@dataclass(frozen=True)
class MeasuredSpan:
    """One executed operation. All times are in seconds.

    Attributes:
        operation: The operation.
        microbatch: Index of its microbatch.
        start: Start, since the iteration's common origin.
        end: End, since the iteration's common origin.
        core_seconds: Time that a CPU core spent on the operation; None on a GPU. It is less than ``end - start`` if the
            thread had to share the core.
        reading_seconds: Time spent reading the next batch directly before the operation.
    """

    operation: Operation
    microbatch: int
    start: float
    end: float
    core_seconds: float | None = None
    reading_seconds: float = 0.0


class Clock:
    """Times operations with CUDA events on a GPU, and with the host's clock elsewhere."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._origin: Any = 0.0
        self._marks: list[tuple[Operation, int, Any, Any, float, float]] = []
        self._reading = 0.0

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """Set the iteration's origin. Call it on all ranks directly after a common synchronization."""
        self._marks = []
        self._reading = 0.0
        self._origin = self._now()

    def start(self) -> tuple[float, Any]:
        """Record the start of an operation; pass the result to :meth:`stop`."""
        return time.thread_time(), self._now()

    def stop(self, operation: Operation, unit: Unit, started: tuple[float, Any]) -> None:
        """Record the end of an operation."""
        end = self._now()
        cores, start = started
        reading, self._reading = self._reading, 0.0
        self._marks.append((operation, unit.microbatch, start, end, time.thread_time() - cores, reading))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Count the time spent inside as reading of the next batch, between two operations."""
        start = time.perf_counter()
        yield
        self._reading += time.perf_counter() - start

    def spans(self) -> list[MeasuredSpan]:
        """Return all operations since :meth:`begin`. On a GPU this waits for the last of them."""
        if self._cuda and self._marks:
            self._marks[-1][3].synchronize()
        return [
            MeasuredSpan(
                key, microbatch, self._seconds(start), self._seconds(end), None if self._cuda else cores, reading
            )
            for key, microbatch, start, end, cores, reading in self._marks
        ]

    def _seconds(self, mark: Any) -> float:
        if self._cuda:
            return float(self._origin.elapsed_time(mark)) / 1e3
        return float(mark) - float(self._origin)
