"""What rooms that must not import one another hand each other."""

from __future__ import annotations

from typing import Protocol


class Exchange(Protocol):
    """The two collectives among the ranks of one pipeline, on the host and bounded in time."""

    rank: int

    def broadcast(self, data: bytes | None) -> bytes:
        """Rank 0's bytes, to all."""
        ...

    def gather(self, data: bytes) -> list[bytes]:
        """Everyone's bytes, to all, in the order of ranks."""
        ...


class Timed(Protocol):
    """Something that ran: ``start`` and ``end`` in seconds of one clock."""

    @property
    def start(self) -> float: ...

    @property
    def end(self) -> float: ...
