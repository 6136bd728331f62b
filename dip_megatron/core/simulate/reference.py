"""The plain simulator: slow, readable, and the definition of what a schedule takes. Kernels are tested against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import CouplingError
from ..experts import NO_EXPERTS, ExpertLayers
from ..graph import Floats, OperationGraph
from ..operations import Kind, Operation
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


@dataclass(frozen=True, eq=False)
class SetTimeline:
    """Of G >= 1 replicas that run together: ``replicas[g]`` is replica g's timeline, ``iteration_time`` (seconds) lasts
    until the last one is done."""

    replicas: tuple[Timeline, ...]
    iteration_time: float

    def bubble_ratio(self, replica: int) -> float:
        """The share of a replica's ranks' time, until the last replica is done, in which they compute no operation;
        waiting inside an operation for the longest member counts as computing."""
        line = self.replicas[replica]
        busy = sum(float((e - s).sum()) for s, e in zip(line.start, line.computed, strict=True))
        return idle_share(busy, self.iteration_time * len(line.start))


def idle_share(busy: float, available: float) -> float:
    """The share of ``available`` seconds that are not ``busy``: 0 where sums in another order make it a bit less."""
    return min(1.0, max(0.0, 1.0 - busy / available)) if available > 0 else 0.0


def simulate(graph: OperationGraph, schedule: Schedule) -> Timeline:
    """:func:`simulate_set` of one replica."""
    return simulate_set((graph,), (schedule,)).replicas[0]


def simulate_set(
    graphs: Sequence[OperationGraph], schedules: Sequence[Schedule], experts: ExpertLayers = NO_EXPERTS
) -> SetTimeline:
    """The plain definition: each rank of each replica runs its order as early as its inputs allow.

    On pipeline rank p the i-th operation that meets (F, B or BW of a chunk with ``experts``) of every replica is one
    event: it starts when the last member could, and takes the longest of their durations. One replica alone has no one
    to wait for.

    Args:
        graphs: One graph a replica.
        schedules: One schedule a replica.
        experts: The layers in which the replicas meet.

    Raises:
        DeadlockError: If the orders can't end.
        CouplingError: If replicas run different chunks or directions at one event.
    """
    count, ranks = len(graphs), graphs[0].ranks
    meets = [experts.meets(g) for g in graphs]
    ends = [{k: np.full((g.virtual_microbatches, ranks), np.nan) for k in (Kind.F, Kind.B)} for g in graphs]
    times: list[list[list[tuple[float, float]]]] = [[[] for _ in range(ranks)] for _ in graphs]

    def current(g: int, p: int) -> tuple[Kind, int] | None:
        order, i = schedules[g].orders[p], len(times[g][p])
        rows = graphs[g].virtual_microbatches
        return None if i == len(order) else (Kind(int(order[i]) // rows), int(order[i]) % rows)

    def ready(g: int, p: int, kind: Kind, s: int) -> float:
        """When the operation could start; nan if that is not known yet."""
        arrivals = [ends[g][d.kind][d.virtual_microbatch, d.rank] + d.seconds for d in graphs[g].inputs(kind, s, p)]
        return float(np.max([times[g][p][-1][1] if times[g][p] else 0.0, *arrivals]))

    def seconds(g: int, p: int, kind: Kind, s: int) -> float:
        graph = graphs[g]
        of = {Kind.F: graph.forward, Kind.B: graph.backward, Kind.W: graph.weight, Kind.BW: graph.fused}
        return float(of[kind][int(schedules[g].strategy[s, p]), s, p])

    def run(g: int, p: int, kind: Kind, s: int, start: float, length: float) -> None:
        times[g][p].append((start, start + length))
        if kind != Kind.W:
            ends[g][Kind.F if kind == Kind.F else Kind.B][s, p] = start + length

    progressed = True
    while progressed:
        progressed = False
        for p in range(ranks):
            waiting: list[tuple[int, Kind, int, float]] = []
            for g in range(count):
                while (here := current(g, p)) is not None:
                    kind, s = here
                    at = ready(g, p, kind, s)
                    if np.isnan(at):
                        break
                    if meets[g][s, p] and kind != Kind.W:
                        waiting.append((g, kind, s, at))
                        break
                    run(g, p, kind, s, at, seconds(g, p, kind, s))
                    progressed = True
            if len(waiting) == count:
                check_event([graphs[g].operation(kind, s, p) for g, kind, s, _ in waiting])
                start = max(at for *_, at in waiting)
                length = max(seconds(g, p, kind, s) for g, kind, s, _ in waiting)
                for g, kind, s, _ in waiting:
                    run(g, p, kind, s, start, length)
                progressed = True
    if any(current(g, p) is not None for g in range(count) for p in range(ranks)):
        raise DeadlockError(where_stuck(graphs, schedules, [[len(line) for line in lines] for lines in times]))
    replicas = []
    for graph, schedule, lines in zip(graphs, schedules, times, strict=True):
        start_of, end_of = (tuple(np.array([t[i] for t in line], dtype=np.float64) for line in lines) for i in (0, 1))
        peak = np.array([_peak_bytes(graph, schedule, p) for p in range(ranks)])
        time = max((line[-1][1] for line in lines if line), default=0.0)
        replicas.append(Timeline(start_of, end_of, peak, time, graph.overhead))
    return SetTimeline(tuple(replicas), max(r.iteration_time for r in replicas))


def _peak_bytes(graph: OperationGraph, schedule: Schedule, rank: int) -> float:
    """The most bytes that a rank holds. ``activation`` is taken at the start of F; it is given back at the end of BW,
    or at the end of B down to ``deferred_activation``, and that at the end of W; an operation without backward gives
    all back at the end of its F."""
    held = peak = float(graph.static_bytes[rank])
    for code in schedule.orders[rank].tolist():
        kind, s = divmod(code, graph.virtual_microbatches)
        c = int(schedule.strategy[s, rank])
        activation, deferred = float(graph.activation[c, s, rank]), float(graph.deferred_activation[c, s, rank])
        if kind == Kind.F:
            held += activation
            peak = max(peak, held)
            if not graph.has_backward[s, rank]:
                held -= activation
        elif kind == Kind.W:
            held -= deferred
        else:
            held -= activation
            if kind == Kind.B and graph.has_weight[s, rank]:
                held += deferred
                peak = max(peak, held)
    return peak


def check_event(operations: Sequence[Operation]) -> None:
    """Raises CouplingError unless the operations ``[replica]`` can be one event."""
    first = operations[0]
    for g, other in enumerate(operations):
        a, b = ((o.module, o.segment, o.kind == Kind.F) for o in (first, other))
        if a != b:
            raise CouplingError(
                "order", f"replica 0 runs {first} where replica {g} runs {other}: they can't be one event"
            )


def where_stuck(
    graphs: Sequence[OperationGraph], schedules: Sequence[Schedule], places: Sequence[Sequence[int]]
) -> str:
    """The message of a deadlock; ``places[replica][rank]``: how many operations have run."""
    stuck = [
        f"{f'replica {g}, ' if len(graphs) > 1 else ''}rank {p} at {schedule.operation(graph, p, i)}"
        for g, (graph, schedule, mine) in enumerate(zip(graphs, schedules, places, strict=True))
        for p, i in enumerate(mine)
        if i < len(schedule.orders[p])
    ]
    subject = "the plans can't end together" if len(graphs) > 1 else "the plan can't end"
    return f"{subject}: {', '.join(stuck[:8])}{', ...' if len(stuck) > 8 else ''}"
