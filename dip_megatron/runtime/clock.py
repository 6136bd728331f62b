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
    """One executed operation; seconds since the iteration's common start."""

    operation: Operation
    microbatch: int
    start: float
    end: float


class Clock:
    """Times operations with CUDA events where there is a GPU, else with the host clock."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._origin: Any = 0.0
        self._marks: list[tuple[Operation, int, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """Set the iteration's origin; call it on all ranks right after a common synchronisation."""
        self._marks = []
        self._origin = self._now()

    @contextmanager
    def span(self, operation: Operation, unit: Unit) -> Iterator[None]:
        """Time what is done inside."""
        start = self._now()
        yield
        self._marks.append((operation, unit.microbatch, start, self._now()))

    def spans(self) -> list[MeasuredSpan]:
        """All operations since :meth:`begin`. On a GPU, waits for the last of them."""
        if self._cuda and self._marks:
            self._marks[-1][3].synchronize()
        return [
            MeasuredSpan(key, microbatch, self._seconds(start), self._seconds(end))
            for key, microbatch, start, end in self._marks
        ]

    def _seconds(self, mark: Any) -> float:
        if self._cuda:
            return float(self._origin.elapsed_time(mark)) / 1e3
        return float(mark) - float(self._origin)
