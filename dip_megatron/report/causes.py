"""Why ranks are idle in an iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core import OperationGraph, Schedule
from ..core.graph import Floats
from ..core.idle_causes import idle_before

CAUSES = ("fill", "imbalance", "dependency", "communication", "straggling")


@dataclass(frozen=True)
class IdleCauses:
    """Seconds that one rank is idle, by cause; with ``busy`` they add up to the iteration of the slowest replica.

    ``fill``: before the rank's first operation and after its last, while the pipeline fills and drains. ``imbalance``:
    the rank has less work than the busiest one, so that no order could keep it busy; taken from ``dependency`` first,
    then from ``fill``. ``dependency``: a stage that the next operation needs still runs elsewhere. ``communication``:
    that stage has ended, its output isn't here yet; measured, all that passes between two operations counts here.
    ``straggling``: the rank's replica has ended, another one has not.
    """

    busy: float
    fill: float
    imbalance: float
    dependency: float
    communication: float
    straggling: float


def idle_causes(
    graph: OperationGraph, schedule: Schedule, start: Sequence[Floats], end: Sequence[Floats], straggling: float = 0.0
) -> list[IdleCauses]:
    """One for each rank. ``start`` and ``end`` (seconds) as in :class:`Timeline`, planned or measured; ``straggling``:
    seconds from this replica's end to the slowest replica's."""
    idle = idle_before(graph, schedule.orders, start, end)
    whole = max((float(e[-1]) for e in end if len(e)), default=0.0)
    busy = [float((e - s).sum()) for s, e in zip(start, end, strict=True)]
    found = []
    for rank, own in enumerate(idle):
        if not len(end[rank]):
            found.append(IdleCauses(0.0, 0.0, whole, 0.0, 0.0, straggling))
            continue
        fill = float(own.waiting[0] + own.between[0]) + whole - float(end[rank][-1])
        dependency, communication = float(own.waiting[1:].sum()), float(own.between[1:].sum())
        uneven = max(busy) - busy[rank]
        inside = min(uneven, dependency)
        outside = min(uneven - inside, fill)
        found.append(
            IdleCauses(busy[rank], fill - outside, inside + outside, dependency - inside, communication, straggling)
        )
    return found
