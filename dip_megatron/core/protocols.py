"""What rooms that must not import one another hand each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Exchange(Protocol):
    """Collectives among some ranks, those of one replica for the most part, on the host and bounded in time."""

    rank: int

    def broadcast(self, data: bytes | None) -> bytes:
        """Rank 0's bytes, to all."""
        ...

    def gather(self, data: bytes) -> list[bytes]:
        """Everyone's bytes, to all, in the order of ranks."""
        ...


class ScatteringExchange(Exchange, Protocol):
    """One that also hands each rank something of its own."""

    def scatter(self, parts: Sequence[bytes] | None) -> bytes:
        """Of rank 0's ``parts`` each rank its own."""
        ...


class Timed(Protocol):
    """Something that ran: ``start`` and ``end`` in seconds of one clock."""

    @property
    def start(self) -> float: ...

    @property
    def end(self) -> float: ...
