"""What the list scheduler works on: buffers that are made once for a problem, and hold the result."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.graph import Floats, Ints
from .problem import Problem

Records = NDArray[np.void]
Words = NDArray[np.uint64]

# Operations still to be known: how many inputs are outstanding, and when the last of the others arrives.
NODE = np.dtype(
    [("arrives_forward", "f8"), ("arrives_backward", "f8"), ("waits_forward", "i4"), ("waits_backward", "i4")]
)
QUEUED = np.dtype([("key_forward", "f8"), ("key_backward", "f8"), ("place_forward", "i4"), ("place_backward", "i4")])
# attention: when the rank should look at its queues again; pending: what split backwards hold for weight gradients.
RANK = np.dtype(
    [
        ("clock", "f8"), ("attention", "f8"), ("remaining_time", "f8"), ("free", "i8"), ("pending", "i8"),
        ("remaining", "i4"), ("length", "i4"), ("queue_head", "i4"), ("queue_tail", "i4"), ("head", "i4"),
        ("closed", "i4"), ("stale", "?"), ("was_forward", "?"), ("bounded", "?"),
    ],
    align=True,
)  # fmt: skip
# closed: the first sink in order for which not even the smallest forward is admitted, nor for any later one.
# A rank's view of one sink; room: the most that may be taken from those before it; ahead: what it finds once they end.
RESERVATION = np.dtype([(x, "i8") for x in ("need", "give", "passing", "passing_count", "room", "ahead")])


class Work(NamedTuple):
    """Buffers of the list scheduler, and its results: ``orders`` ``[P, 3S]``, ``lengths`` ``[P]``, ``strategy``
    ``[N]``."""

    orders: Ints
    lengths: Ints
    strategy: NDArray[np.int8]
    node: Records
    queued: Records
    rank: Records
    reservation: Records
    by_forward: Ints
    by_backward: Ints
    group_order: Ints
    position: Ints
    earliest: Ints
    known_forward: Words
    known_backward: Words
    queue: Ints
    keys: Floats


def make_work(q: Problem) -> Work:
    """Buffers for :func:`dispatch` on ``q``."""
    virtual_microbatches, ranks, sinks = q.graph.virtual_microbatches, q.graph.ranks, len(q.reservation)
    words = (virtual_microbatches + 63) // 64

    def numbers(count: int) -> Ints:
        return np.arange(count, dtype=np.int32)

    return Work(
        orders=np.zeros((ranks, 3 * virtual_microbatches), dtype=np.int32),
        lengths=np.zeros(ranks, dtype=np.int32),
        strategy=np.zeros(virtual_microbatches * ranks, dtype=np.int8),
        node=np.zeros(virtual_microbatches * ranks, dtype=NODE),
        queued=np.zeros(virtual_microbatches, dtype=QUEUED),
        rank=np.zeros(ranks, dtype=RANK),
        reservation=np.zeros((ranks, sinks), dtype=RESERVATION),
        by_forward=numbers(virtual_microbatches),
        by_backward=numbers(virtual_microbatches),
        group_order=numbers(q.groups),
        position=numbers(sinks),
        earliest=numbers(virtual_microbatches),
        known_forward=np.zeros((ranks, words), dtype=np.uint64),
        known_backward=np.zeros((ranks, words), dtype=np.uint64),
        queue=np.zeros((ranks, virtual_microbatches), dtype=np.int32),
        keys=np.zeros(max(virtual_microbatches, q.groups)),
    )
