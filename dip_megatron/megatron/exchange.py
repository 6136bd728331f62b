"""Host-side collectives among ranks, of one replica for the most part, over gloo and bounded in time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ..runtime.groups import local_group
from ..runtime.transport import TransportError


class GlooExchange:
    """See :class:`dip_megatron.core.protocols.ScatteringExchange`. Calls raise TransportError where others don't take
    part."""

    def __init__(self, global_ranks: list[int], timeout_seconds: float):
        """All ``global_ranks`` construct it at the same time; the first of them is rank 0."""
        self._ranks = global_ranks
        self._group = local_group(global_ranks, "gloo", timedelta(seconds=timeout_seconds))
        self.rank = global_ranks.index(dist.get_rank())

    def broadcast(self, data: bytes | None) -> bytes:
        """The first rank's bytes."""
        size = torch.tensor([len(data or b"")], dtype=torch.int64)
        with self._together():
            dist.broadcast(size, self._ranks[0], group=self._group)
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if data is not None:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        if len(buffer):
            with self._together():
                dist.broadcast(buffer, self._ranks[0], group=self._group)
        return buffer.numpy().tobytes()

    def gather(self, data: bytes) -> list[bytes]:
        """Everyone's bytes, in the order of ranks."""
        count = len(self._ranks)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(count)]
        with self._together():
            dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64), group=self._group)
        longest = max(int(s) for s in sizes)
        padded = _padded(data, max(longest, 1))
        gathered = [torch.empty_like(padded) for _ in range(count)]
        with self._together():
            dist.all_gather(gathered, padded, group=self._group)
        return [g[: int(s)].numpy().tobytes() for g, s in zip(gathered, sizes, strict=True)]

    def scatter(self, parts: Sequence[bytes] | None) -> bytes:
        """Of the first rank's ``parts`` each rank its own."""
        root, size = self._ranks[0], torch.empty(1, dtype=torch.int64)
        sizes = None if parts is None else [torch.tensor([len(part)], dtype=torch.int64) for part in parts]
        longest = torch.tensor([max(map(len, parts))] if parts else [0], dtype=torch.int64)
        with self._together():
            dist.scatter(size, sizes, root, group=self._group)
            dist.broadcast(longest, root, group=self._group)
        buffer = torch.empty(int(longest), dtype=torch.uint8)
        padded = None if parts is None else [_padded(part, int(longest)) for part in parts]
        with self._together():
            dist.scatter(buffer, padded, root, group=self._group)
        return buffer[: int(size)].numpy().tobytes()

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            mine = self._ranks[self.rank]
            others = ", ".join(str(rank) for rank in self._ranks if rank != mine)
            raise TransportError(f"waiting for global ranks {others}: {str(error).splitlines()[0]}") from error


def _padded(data: bytes, length: int) -> torch.Tensor:
    tensor = torch.zeros(length, dtype=torch.uint8)
    if data:
        tensor[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return tensor
