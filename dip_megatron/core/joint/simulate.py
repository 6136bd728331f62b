"""Time of coupled replicas: a stage that meets begins when all members are ready and lasts as long as the longest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..experts import ExpertLayers
from ..graph import Floats, OperationGraph
from ..operations import Kind, Operation
from ..order import Schedule
from ..simulate.kernels import graph_arrays, pad_orders, peak_memory
from ..simulate.reference import DeadlockError, Timeline, idle_share
from .kernels import DISAGREE, JointArrays, joint_arrays, pad_joint_orders, replay_joint


class JointError(ValueError):
    """Plans that may not run together. ``condition`` says which rule is broken: ``size`` (replicas, ranks or modules
    differ), ``plan`` (one plan by itself), ``order``, ``recompute``, ``pairing``, ``reduction`` or ``cycle``; the
    message names the first pair of operations."""

    def __init__(self, condition: str, message: str) -> None:
        super().__init__(message)
        self.condition = condition


@dataclass(frozen=True, eq=False)
class JointTimeline:
    """``replicas[g]``: start and end of each operation of replica g, and its peak bytes; ``iteration_time`` (seconds)
    until the last replica is done."""

    replicas: tuple[Timeline, ...]
    iteration_time: float

    def bubble_ratio(self, replica: int) -> float:
        """The share of a replica's ranks' time, until the last replica is done, in which they compute no operation;
        waiting inside a stage for the longest member counts as computing."""
        line = self.replicas[replica]
        busy = sum(float((e - s).sum()) for s, e in zip(line.start, line.computed, strict=True))
        return idle_share(busy, self.iteration_time * len(line.start))


def simulate_joint(
    graphs: Sequence[OperationGraph], schedules: Sequence[Schedule], experts: ExpertLayers
) -> JointTimeline:  # fmt: skip
    """The plain definition. On pipeline rank p the i-th operation that meets (F, B or BW of a stage with experts) of
    every replica is one event: it starts at the latest time at which a member could start, and takes the longest of
    their durations. All else is as in :func:`..simulate.simulate`, replica by replica.

    Raises DeadlockError when the orders can't end, JointError when members run different kinds of operations of
    different chunks at one event.
    """
    count, ranks = len(graphs), graphs[0].ranks
    meets = [experts.meets(g) for g in graphs]
    ends = [{k: np.full((g.virtual_microbatches, ranks), np.nan) for k in (Kind.F, Kind.B)} for g in graphs]
    times: list[list[list[tuple[float, float]]]] = [[[] for _ in range(ranks)] for _ in graphs]
    members = range(count)

    def current(g: int, p: int) -> tuple[Kind, int] | None:
        order, i = schedules[g].orders[p], len(times[g][p])
        rows = graphs[g].virtual_microbatches
        return None if i == len(order) else (Kind(int(order[i]) // rows), int(order[i]) % rows)

    def ready(g: int, p: int, kind: Kind, s: int) -> float:
        """When it could start; nan if that is not known yet."""
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
            for g in members:
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
                _same([graphs[g].operation(kind, s, p) for g, kind, s, _ in waiting])
                start = max(at for *_, at in waiting)
                length = max(seconds(g, p, kind, s) for g, kind, s, _ in waiting)
                for g, kind, s, _ in waiting:
                    run(g, p, kind, s, start, length)
                progressed = True
    stuck = [(g, p) for g in members for p in range(ranks) if current(g, p) is not None]
    if stuck:
        raise DeadlockError(_where(graphs, schedules, [(g, p, len(times[g][p])) for g, p in stuck]))
    replicas = []
    for g in members:
        spans = [tuple(np.array([t[i] for t in line], dtype=np.float64) for line in times[g]) for i in (0, 1)]
        replicas.append(_timeline(graphs[g], schedules[g], *spans))
    return JointTimeline(tuple(replicas), max(r.iteration_time for r in replicas))


def _same(operations: Sequence[Operation]) -> None:
    """Raises JointError unless the operations ``[replica]`` can be one event."""
    first = operations[0]
    for g, other in enumerate(operations):
        a, b = ((o.module, o.segment, o.kind == Kind.F) for o in (first, other))
        if a != b:
            raise JointError("order", f"replica 0 runs {first} where replica {g} runs {other}: they can't be one event")


def _where(
    graphs: Sequence[OperationGraph], schedules: Sequence[Schedule], stuck: Sequence[tuple[int, int, int]]
) -> str:
    places = [f"replica {g}, rank {p} at {schedules[g].operation(graphs[g], p, i)}" for g, p, i in stuck[:8]]
    return "the plans can't end together: " + ", ".join(places) + (", ..." if len(stuck) > 8 else "")


def _timeline(
    graph: OperationGraph, schedule: Schedule, start: tuple[Floats, ...], end: tuple[Floats, ...]
) -> Timeline:
    g = graph_arrays(graph)
    orders, lengths = pad_orders(schedule)
    strategy = np.ascontiguousarray(schedule.strategy.reshape(-1))
    peak = np.array([peak_memory(g, p, orders[p], int(lengths[p]), strategy) for p in range(graph.ranks)])
    time = max((float(line[-1]) for line in end if len(line)), default=0.0)
    return Timeline(start, end, peak, time, graph.overhead)


def simulate_joint_compiled(
    graphs: Sequence[OperationGraph], schedules: Sequence[Schedule], experts: ExpertLayers,
    arrays: JointArrays | None = None,
) -> JointTimeline:  # fmt: skip
    """:func:`simulate_joint`, compiled: the same numbers, bit for bit. ``arrays``: ``joint_arrays(graphs, schedules,
    experts)`` if the caller has it at hand."""
    x = joint_arrays(graphs, [s.strategy for s in schedules], experts) if arrays is None else arrays
    orders, lengths = pad_joint_orders(x, schedules)
    start, end = np.zeros(orders.shape), np.zeros(orders.shape)
    place = np.zeros(len(lengths), dtype=np.int32)
    time = replay_joint(
        x, orders, lengths, start, end, place, np.zeros(len(lengths)), np.zeros(x.nodes), np.zeros(x.nodes)
    )
    ranks = graphs[0].ranks
    if time <= DISAGREE:
        p = int(DISAGREE - time)
        _same(
            [
                s.operation(g, p, int(place[i * ranks + p]))
                for i, (g, s) in enumerate(zip(graphs, schedules, strict=True))
            ]
        )
    if np.isnan(time):
        stuck = [
            (g, p, int(place[g * ranks + p]))
            for g in range(len(graphs))
            for p in range(ranks)
            if place[g * ranks + p] < lengths[g * ranks + p]
        ]
        raise DeadlockError(_where(graphs, schedules, stuck))
    replicas = []
    for g, (graph, schedule) in enumerate(zip(graphs, schedules, strict=True)):
        lines = range(g * ranks, (g + 1) * ranks)
        replicas.append(
            _timeline(
                graph, schedule, tuple(start[n, : lengths[n]].copy() for n in lines),
                tuple(end[n, : lengths[n]].copy() for n in lines),
            )
        )  # fmt: skip
    return JointTimeline(tuple(replicas), float(time))
