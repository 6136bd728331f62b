"""The plain simulator: slow, readable, and the definition of what a schedule takes. Kernels are tested against it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..graph import Floats, OperationGraph
from ..operations import Kind
from ..order import Schedule


class DeadlockError(ValueError):
    """The orders of the ranks wait for one another; the message says where each rank stands."""


@dataclass(frozen=True, eq=False)
class Timeline:
    """Start and end (seconds) of each operation, ``start[rank][i]`` belonging to ``schedule.orders[rank][i]``; peak
    bytes per rank, static bytes included; ``iteration_time`` in seconds. ``overhead``: see :class:`OperationGraph`; it
    stands at the end of each operation."""

    start: tuple[Floats, ...]
    end: tuple[Floats, ...]
    peak_bytes: Floats
    iteration_time: float
    overhead: tuple[float, ...] = ()

    @property
    def computed(self) -> tuple[Floats, ...]:
        """When each operation has computed; its overhead follows."""
        if not self.overhead:
            return self.end
        ranks = zip(self.start, self.end, self.overhead, strict=True)
        return tuple(np.maximum(end - seconds, start) for start, end, seconds in ranks)

    @property
    def bubble_ratio(self) -> float:
        """The share of all ranks' time, from the iteration's start to its end, in which they compute no operation: they
        wait, or are between two of them. From 0 to 1."""
        busy = sum(float((e - s).sum()) for s, e in zip(self.start, self.computed, strict=True))
        return idle_share(busy, self.iteration_time * len(self.start))


def idle_share(busy: float, available: float) -> float:
    """The share of ``available`` seconds that are not ``busy``: 0 where sums in another order make it a bit less."""
    return min(1.0, max(0.0, 1.0 - busy / available)) if available > 0 else 0.0


def simulate(graph: OperationGraph, schedule: Schedule) -> Timeline:
    """Run each rank's order as early as its inputs allow. Raises DeadlockError when the orders can't end.

    Memory, per rank: ``activation`` is taken at the start of F; it is given back at the end of BW, or at the end of B
    down to ``deferred_activation``, and that at the end of W; a stage without backward gives all back at the end of
    its F.
    """
    virtual_microbatches, ranks = graph.virtual_microbatches, graph.ranks
    durations = {Kind.F: graph.forward, Kind.B: graph.backward, Kind.W: graph.weight, Kind.BW: graph.fused}
    choice = schedule.strategy
    forward_end = np.full((virtual_microbatches, ranks), np.nan)
    backward_end = np.full((virtual_microbatches, ranks), np.nan)
    end_of = {Kind.F: forward_end, Kind.B: backward_end}
    place = [0] * ranks
    clock = np.zeros(ranks)
    held = graph.static_bytes.astype(np.float64).copy()
    peak = held.copy()
    start: list[list[float]] = [[] for _ in range(ranks)]
    end: list[list[float]] = [[] for _ in range(ranks)]

    def ready_time(kind: Kind, s: int, p: int) -> float:
        """When the inputs of an operation are there; nan if one is not known yet."""
        arrivals = [end_of[d.kind][d.virtual_microbatch, d.rank] + d.seconds for d in graph.inputs(kind, s, p)]
        return float(np.max([0.0, *arrivals]))

    remaining = sum(len(order) for order in schedule.orders)
    while remaining:
        progressed = False
        for p in range(ranks):
            order = schedule.orders[p]
            while place[p] < len(order):
                kind, s = (
                    Kind(int(order[place[p]]) // virtual_microbatches),
                    int(order[place[p]]) % virtual_microbatches,
                )
                ready = ready_time(kind, s, p)
                if np.isnan(ready):
                    break
                c = int(choice[s, p])
                begin = max(float(clock[p]), ready)
                finish = begin + float(durations[kind][c, s, p])
                start[p].append(begin)
                end[p].append(finish)
                clock[p] = finish
                activation, deferred_activation = graph.activation[c, s, p], graph.deferred_activation[c, s, p]
                if kind == Kind.F:
                    held[p] += activation
                    peak[p] = max(peak[p], held[p])
                    forward_end[s, p] = finish
                    if not graph.has_backward[s, p]:
                        held[p] -= activation
                elif kind == Kind.W:
                    held[p] -= deferred_activation
                else:
                    backward_end[s, p] = finish
                    held[p] -= activation
                    if kind == Kind.B and graph.has_weight[s, p]:
                        held[p] += deferred_activation
                        peak[p] = max(peak[p], held[p])
                place[p] += 1
                remaining -= 1
                progressed = True
        if not progressed:
            stuck = ", ".join(
                f"rank {p} at {schedule.operation(graph, p, place[p])}"
                for p, o in enumerate(schedule.orders)
                if place[p] < len(o)
            )
            raise DeadlockError(f"the plan can't end: {stuck}")
    return Timeline(
        tuple(np.array(x) for x in start), tuple(np.array(x) for x in end), peak, float(clock.max(initial=0.0)),
        graph.overhead,
    )  # fmt: skip
