"""Reading ahead: the next iteration's microbatches are known, and being planned, while the current one runs.

Each microbatch is read by the script's own ``forward_step``, up to its call of the model: the data iterator, broadcasts
over tensor-parallel ranks and the batch's layout are the script's business and happen exactly once per microbatch.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from ..compat.token_counts import Counted, TokenCounts
from ..runtime.chunk_runner import ModelStandIn
from ..runtime.protocol import MicrobatchInputs, ModelProgram
from .copies import copied


class _Captured(Exception):
    """Leaves the script's forward_step at its call of the model."""


class RawItems:
    """A data iterator whose coming items can be counted before they are taken."""

    def __init__(self, iterator: Iterator[Any]):
        self._iterator = iterator
        self._ready: deque[Any] = deque()

    def at_hand(self, count: int) -> int:
        """Read until ``count`` items are waiting; how many there are, fewer at the end of the data."""
        try:
            while len(self._ready) < count:
                self._ready.append(next(self._iterator))
        except StopIteration:
            pass
        return len(self._ready)

    def __iter__(self) -> RawItems:
        return self

    def __next__(self) -> Any:
        return self._ready.popleft() if self._ready else next(self._iterator)


class _Recorder:
    """Passes on a data iterator's items and remembers them."""

    def __init__(self, iterator: Iterator[Any]):
        self.items: list[Any] = []
        self._iterator = iterator

    def __iter__(self) -> _Recorder:
        return self

    def __next__(self) -> Any:
        item = next(self._iterator)
        self.items.append(copy.copy(item))  # scripts may take a batch's dict apart
        return item


class _First:
    """A process group as its first rank sees it."""

    def __init__(self, size: int):
        self._size = size

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self._size


def capture_microbatch(
    forward_step_func: Callable[..., Any],
    data_iterator: Iterator[Any] | None,
    chunk: torch.nn.Module,
    program: ModelProgram,
    kind: type[ModelStandIn] = ModelStandIn,
) -> MicrobatchInputs:
    """Read one microbatch. Raises StopIteration when the data has ended, ValueError for what can't be segmented."""
    captured: dict[str, Any] = {}

    def call(*args: Any, **kwargs: Any) -> Any:
        captured.update(program.bind(*args, **kwargs))
        raise _Captured

    recorder = None if data_iterator is None else _Recorder(data_iterator)
    stand_in = kind(chunk, call)
    if copied(program.modules):
        # Steps keep pixels for the first stage, which they know by the model's groups; here every rank encodes.
        groups = ProcessGroupCollection.use_mpu_process_groups()
        stand_in.pg_collection = copy.copy(groups)
        stand_in.pg_collection.pp = _First(groups.pp.size())
    try:
        forward_step_func(recorder, stand_in)
    except _Captured:
        return MicrobatchInputs(captured, None if recorder is None else recorder.items)
    raise ValueError(
        "the script's forward_step returned without calling its model; DIP needs exactly one call of model(...) per "
        "microbatch. Use --dip-schedule off for this script"
    )


class LookAhead:
    """Microbatches of one data iterator, read at most one iteration ahead and never lost.

    What has been read for an iteration that asks for fewer microbatches than expected (batch-size ramp) stays for the
    next. Saved checkpoints count consumed samples, not read ones, so that resuming reads the look-ahead again.
    """

    def __init__(
        self,
        read: Callable[[], MicrobatchInputs],
        items: RawItems | None = None,
        gather: Callable[[bytes], list[bytes]] | None = None,
        counts: TokenCounts | None = None,
    ):
        """``read`` reads one microbatch, from ``items`` if there are any, raising StopIteration at the end of the data.
        ``counts`` are the loop's (None: Megatron's).

        ``gather`` is given where ``read`` may be a collective of several ranks (Megatron's scripts read on one
        tensor-parallel rank and broadcast): it returns everyone's bytes. At the end of the data the others would wait
        for a broadcast that never comes, so the ranks first agree on what there is to read.
        """
        self._read = read
        self._items = items
        self._gather = gather
        self._items_each = 1
        self._buffer: deque[MicrobatchInputs] = deque()
        # What the script counted when it read them: it belongs to the iteration that takes them.
        self._counts = counts or TokenCounts()
        self._counted: deque[Counted] = deque()
        self.exhausted = False

    @property
    def waiting(self) -> int:
        """How many microbatches have been read and not taken."""
        return len(self._buffer)

    def take(self, count: int) -> list[MicrobatchInputs]:
        """The next ``count`` microbatches. Raises StopIteration if the data ends before."""
        if not self.fill(count):
            self.exhausted = False  # told once: there are iterators that begin anew then, with another epoch
            raise StopIteration(f"the data has ended: {len(self._buffer)} of {count} microbatches are left")
        for _ in range(count):
            self._counts.count(self._counted.popleft())
        return [self._buffer.popleft() for _ in range(count)]

    def fill(self, count: int) -> bool:
        """Read until ``count`` microbatches are at hand; False if the data has ended before."""
        missing = count - len(self._buffer)
        if missing > 0 and not self.exhausted:
            readable = self._readable(missing)
            try:
                for _ in range(readable):
                    with self._counts.set_aside() as counted:
                        self._buffer.append(self._read())
                    self._counted.append(counted)
                    if self._buffer[-1].items:
                        self._items_each = max(self._items_each, len(self._buffer[-1].items))
            except StopIteration:
                readable = 0
            self.exhausted = readable < missing
        return len(self._buffer) >= count

    def peek(self, count: int) -> list[MicrobatchInputs]:
        """The next ``count`` microbatches (fewer at the end of the data), without taking them."""
        self.fill(count)
        return list(self._buffer)[:count]

    def _readable(self, missing: int) -> int:
        """How many of ``missing`` microbatches every rank that has data has."""
        if self._gather is None:
            return missing
        here = missing
        if self._items is not None:
            here = min(missing, self._items.at_hand(missing * self._items_each) // self._items_each)
        return min(int.from_bytes(count, "big") for count in self._gather(here.to_bytes(4, "big")))
