"""Reading ahead: the next iteration's microbatches are known, and being planned, while the current one runs.

Each microbatch is read by the script's own ``forward_step``, up to its call of the model: the data iterator, broadcasts
over tensor-parallel ranks and the batch's layout are the script's business and happen exactly once per microbatch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..models.protocol import MicrobatchInputs, StageProgram
from ..runtime.stages import ModelStandIn


class _Captured(Exception):
    """Leaves the script's forward_step at its call of the model."""


class _Recorder:
    """Passes on a data iterator's items and remembers them."""

    def __init__(self, iterator: Iterator[Any]):
        self.items: list[Any] = []
        self._iterator = iterator

    def __iter__(self) -> _Recorder:
        return self

    def __next__(self) -> Any:
        item = next(self._iterator)
        self.items.append(item)
        return item


def capture_microbatch(
    forward_step_func: Callable[..., Any],
    data_iterator: Iterator[Any] | None,
    chunk: torch.nn.Module,
    program: StageProgram,
) -> MicrobatchInputs:
    """Read one microbatch. Raises StopIteration when the data has ended, ValueError for what can't be segmented."""
    captured: dict[str, Any] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        captured.update(program.bind(*args, **kwargs))
        raise _Captured

    recorder = None if data_iterator is None else _Recorder(data_iterator)
    try:
        forward_step_func(recorder, ModelStandIn(chunk, call))
    except _Captured:
        return MicrobatchInputs(captured, [] if recorder is None else recorder.items)
    raise ValueError(
        "the script's forward_step returned without calling its model; DIP needs exactly one call of model(...) per "
        "microbatch. Use --dip-schedule off for this script"
    )


class LookAhead:
    """Microbatches of one data iterator, read at most one iteration ahead and never lost.

    What has been read for an iteration that asks for fewer microbatches than expected (batch-size ramp) stays for the
    next. Saved checkpoints count consumed samples, not read ones, so that resuming reads the look-ahead again.
    """

    def __init__(self, read: Callable[[], MicrobatchInputs]):
        """``read`` reads one microbatch, raising StopIteration at the end of the data."""
        self._read = read
        self._buffer: deque[MicrobatchInputs] = deque()
        self.exhausted = False

    def take(self, count: int) -> list[MicrobatchInputs]:
        """The next ``count`` microbatches. Raises StopIteration if the data ends before."""
        if not self.fill(count):
            raise StopIteration
        return [self._buffer.popleft() for _ in range(count)]

    def fill(self, count: int) -> bool:
        """Read until ``count`` microbatches are at hand; False if the data has ended before."""
        while len(self._buffer) < count and not self.exhausted:
            try:
                self._buffer.append(self._read())
            except StopIteration:
                self.exhausted = True
        return len(self._buffer) >= count

    def peek(self, count: int) -> list[MicrobatchInputs]:
        """The next ``count`` microbatches (fewer at the end of the data), without taking them."""
        self.fill(count)
        return list(self._buffer)[:count]
