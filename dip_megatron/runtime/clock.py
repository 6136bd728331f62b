"""Measured start and end of every operation, without stopping the device."""

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
    """One executed operation; seconds since the iteration's common start.

    ``core_seconds``: what a core of the host spent on it, None where a device computes; less than from start to end if
    others needed the core. ``reading_seconds``: what reading the next batch took right before it.
    """

    operation: Operation
    microbatch: int
    start: float
    end: float
    core_seconds: float | None = None
    reading_seconds: float = 0.0


class Clock:
    """Times operations with CUDA events where there is a GPU, else with the host clock."""

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
        """Set the iteration's origin; call it on all ranks right after a common synchronisation."""
        self._marks = []
        self._reading = 0.0
        self._origin = self._now()

    def start(self) -> tuple[float, Any]:
        """An operation starts; what to give to :meth:`stop`."""
        return time.thread_time(), self._now()

    def stop(self, operation: Operation, unit: Unit, started: tuple[float, Any]) -> None:
        """It has ended."""
        end = self._now()
        cores, start = started
        reading, self._reading = self._reading, 0.0
        self._marks.append((operation, unit.microbatch, start, end, time.thread_time() - cores, reading))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Time what is done inside as reading of the next batch, between two operations."""
        start = time.perf_counter()
        yield
        self._reading += time.perf_counter() - start

    def spans(self) -> list[MeasuredSpan]:
        """All operations since :meth:`begin`. On a GPU, waits for the last of them."""
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
