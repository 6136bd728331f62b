"""Does any plan fit in memory? If not: how much is missing where, and what would help."""

from __future__ import annotations

import numpy as np

from ...core.graph import OperationGraph
from .problem import Problem


class DoesNotFitError(ValueError):
    """No order and no choice of strategies keeps every rank under its limit. ``rank`` is the worst one, ``missing`` the
    bytes it is short of."""

    def __init__(self, message: str, rank: int, missing: float) -> None:
        super().__init__(message)
        self.rank = rank
        self.missing = missing


def check_fits(graph: OperationGraph, q: Problem) -> None:
    """Raise DoesNotFitError if some group does not fit on some rank even alone and with the leanest strategies.

    Proof that nothing fits then: before the last stage of a sink's forward starts on a rank, every forward that leads
    to it has run there and none of their backwards has, so all are held at once. Several sinks of one group are worked
    off depth first; where they share stages in other than a tree, an order that needs less may exist.
    """
    need = np.zeros(graph.ranks, dtype=np.int64)
    where = np.zeros(graph.ranks, dtype=np.int64)
    held = np.zeros(graph.ranks, dtype=np.int64)
    for g in range(q.groups):
        held[:] = 0
        for k in range(q.sink_start[g], q.sink_start[g + 1]):
            most = np.maximum(held + q.reservation[k], np.where(q.passing_count[k] > 0, held + q.passing[k], 0))
            where = np.where(most > need, k, where)
            need = np.maximum(need, most)
            held += q.reservation[k] - q.freed[k]
    short = need - q.capacity
    rank = int(np.argmax(short))
    if short[rank] <= 0:
        return
    beyond = float(graph.static_bytes[rank] - graph.memory_limit[rank])  # may be more than counts can say
    missing = max(float(short[rank]) * q.bytes_per_count, beyond)
    virtual_microbatch = int(np.flatnonzero(q.last == where[rank])[0])
    microbatch = graph.units[int(graph.unit_of[virtual_microbatch])].microbatch
    knobs = [
        "raise --dip-memory-limit" if graph.static_bytes[rank] < graph.memory_limit[rank] else "lower static memory"
    ]
    if graph.candidates == 1:
        knobs.append("allow recompute or offload")
    knobs += ["use more tensor or pipeline parallel ranks", "pack smaller microbatches"]
    raise DoesNotFitError(
        f"no plan fits in memory: rank {rank} is short of {missing / 2**30:.3f} GiB ({missing:.0f} bytes) for "
        f"microbatch {microbatch} alone with the leanest strategies "
        f"({graph.static_bytes[rank] / 2**30:.2f} GiB static, limit "
        f"{graph.memory_limit[rank] / 2**30:.2f} GiB); {', '.join(knobs)}",
        rank,
        missing,
    )
