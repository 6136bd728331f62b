"""The paper's dual-queue greedy (section 4.2) in plain Python: what is left when no planner worker answers.

It needs neither a process nor compiled kernels, takes milliseconds to tens of milliseconds, and always ends: admission
of forwards follows the banker's rule of :mod:`.dip.admission`, so that the work at the head of the line can always
finish.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import inf

import numpy as np

from ..core import Kind, OperationGraph, Schedule
from ..core.experts import ExpertLayers
from ..core.simulate import fit_in_memory
from .dip.feasibility import check_fits
from .dip.problem import Problem, make_problem


def leanest(graph: OperationGraph) -> np.ndarray:
    """Per stage, the candidate that holds the fewest bytes, ``[S, P]`` int8."""
    return graph.activation.argmin(axis=0).astype(np.int8)


def greedy(graph: OperationGraph) -> Schedule:
    """List-schedule forwards and (unsplit) backwards in the order of microbatches.

    The rank that can start earliest goes next; where a forward and a backward can start at the same time, the kind that
    did not run last (1F1B). Stages use the fastest strategy if everything fits at once, else the leanest. Raises
    DoesNotFitError if not even that fits.
    """
    virtual_microbatches, ranks = graph.virtual_microbatches, graph.ranks
    room = graph.memory_limit - graph.static_bytes
    fast = np.zeros((virtual_microbatches, ranks), dtype=np.int8)
    # A stage without backward holds its bytes only while it runs.
    passing = np.where(graph.has_backward, 0.0, graph.activation[0]).max(axis=0)
    unlimited = bool(np.all(np.where(graph.has_backward, graph.activation[0], 0.0).sum(axis=0) + passing <= room))
    strategy = fast if unlimited else leanest(graph)
    chosen = graph.project(strategy)
    problem = make_problem(chosen)
    if not unlimited:
        check_fits(chosen, problem)
    lines = [_Rank(chosen, problem, p, unlimited) for p in range(ranks)]
    edges = graph.edges
    source, target, transfer = edges.source.tolist(), edges.target.tolist(), edges.transfer.tolist()
    into, out_of = edges.before_start.tolist(), edges.after_start.tolist()
    after = edges.after.tolist()
    nodes = virtual_microbatches * ranks
    arrival = [[0.0] * nodes, [0.0] * nodes]  # of forwards, of backwards: the latest input known so far
    waits = [[into[n + 1] - into[n] for n in range(nodes)], [1 + out_of[n + 1] - out_of[n] for n in range(nodes)]]
    trains = graph.has_backward.reshape(-1).tolist()

    def known(backward: bool, n: int, at: float) -> None:
        """One more input of a stage's operation will be there at a known time."""
        arrival[backward][n] = max(arrival[backward][n], at)
        waits[backward][n] -= 1
        if not waits[backward][n] and (not backward or trains[n]):
            virtual_microbatch, p = divmod(n, ranks)
            lines[p].arrives(backward, virtual_microbatch, arrival[backward][n])

    idle = graph.is_idle.reshape(-1).tolist()
    for n in range(nodes):
        if idle[n]:
            lines[n % ranks].order.append(int(Kind.F) * virtual_microbatches + n // ranks)
        elif not waits[0][n]:
            lines[n % ranks].arrives(False, n // ranks, 0.0)
    remaining = nodes - sum(idle) + sum(trains)
    while remaining:
        p = min(range(ranks), key=lambda r: lines[r].next()[0])
        start, backward, virtual_microbatch = lines[p].next()
        if start == inf:
            raise RuntimeError("no operation may run: the banker's rule has locked up, which it must not")
        end = lines[p].run(start, backward, virtual_microbatch)
        n = virtual_microbatch * ranks + p
        if backward:
            for e in range(into[n], into[n + 1]):
                known(True, source[e], end + transfer[e])
        else:
            known(True, n, end)
            for i in range(out_of[n], out_of[n + 1]):
                known(False, target[after[i]], end + transfer[after[i]])
        remaining -= 1
    return Schedule(tuple(np.array(line.order, dtype=np.int32) for line in lines), strategy)


def greedy_set(graphs: Sequence[OperationGraph], experts: ExpertLayers) -> list[Schedule]:
    """:func:`greedy` for one or several replicas.

    Several are put in the greedy's order of the most work in every place, with their microbatches paired by work; where
    that doesn't fit into memory, they run one slot after the other.

    Args:
        graphs: One graph a replica.
        experts: The layers in which several replicas meet.

    Raises:
        DoesNotFitError: If nothing fits.
    """
    if len(graphs) == 1:
        return [greedy(graphs[0])]
    from .joint import (  # loads a search, which one replica's greedy can do without
        one_slot_at_a_time,
        pairings,
        together,
    )

    t = together(graphs, experts, pairings(graphs, experts)[0])
    schedules = t.schedules(greedy(t.graph))
    return schedules if fit_in_memory(graphs, schedules) else one_slot_at_a_time(t)


class _Rank:
    """One rank's queues, clock and memory. Per sink (:class:`..schedulers.dip.problem.Problem`) ``need`` is what it
    will still take, ``give`` what its end gives back, both in the problem's counts."""

    def __init__(self, graph: OperationGraph, q: Problem, rank: int, unlimited: bool):
        self._virtual_microbatches = graph.virtual_microbatches
        self._forward, self._backward = graph.forward[0, :, rank].tolist(), graph.backward[0, :, rank].tolist()
        self._fused = graph.fused[0, :, rank].tolist()
        self._size, self._lean = (a[rank :: graph.ranks].tolist() for a in (q.activation[0], q.lean))
        self._has_backward = graph.has_backward[:, rank].tolist()
        self._has_weight = graph.has_weight[:, rank].tolist()
        self._first, self._last = q.first.tolist(), q.last.tolist()
        self._need, self._give = q.reservation[:, rank].tolist(), q.freed[:, rank].tolist()
        self._passing, self._passing_count = q.passing[:, rank].tolist(), q.passing_count[:, rank].tolist()
        self._free = int(q.capacity[rank])
        self._unlimited = unlimited
        self._clock = 0.0
        self._was_forward = False
        # What can run now, in its order; (arrival, virtual microbatch) of what comes later. Forwards, backwards.
        self._here: tuple[list[int], list[int]] = ([], [])
        self._coming: tuple[list[tuple[float, int]], list[tuple[float, int]]] = ([], [])
        self._next: tuple[float, bool, int] | None = None
        self.order: list[int] = []

    def arrives(self, backward: bool, virtual_microbatch: int, at: float) -> None:
        """The inputs of an operation are there at ``at`` seconds."""
        heappush(self._coming[backward], (at, virtual_microbatch))
        self._next = None

    def next(self) -> tuple[float, bool, int]:
        """(start, whether a backward, virtual microbatch) of what it would run next; start is inf if nothing can."""
        if self._next is None:
            options = [(*self._earliest(backward), backward) for backward in (False, True)]
            start, _, virtual_microbatch, backward = min(
                (t, b != self._was_forward, virtual_microbatch, b) for t, virtual_microbatch, b in options
            )
            self._next = (start, backward, virtual_microbatch)
        return self._next

    def _earliest(self, backward: bool) -> tuple[float, int]:
        here, coming = self._here[backward], self._coming[backward]
        while coming and coming[0][0] <= self._clock:
            insort(here, heappop(coming)[1])
        for virtual_microbatch in here:
            if backward or self._admitted(virtual_microbatch):
                return self._clock, virtual_microbatch
        if backward or self._unlimited:
            return coming[0] if coming else (inf, -1)
        return min((x for x in coming if self._admitted(x[1])), default=(inf, -1))

    def run(self, start: float, backward: bool, virtual_microbatch: int) -> float:
        """Append an operation; returns its end."""
        here = self._here[backward]
        if virtual_microbatch in here:
            here.remove(virtual_microbatch)
        else:
            self._coming[backward].remove((start, virtual_microbatch))
            heapify(self._coming[backward])
        size = self._size[virtual_microbatch]
        if backward:
            fused = self._has_weight[virtual_microbatch]
            self._clock = start + (self._fused[virtual_microbatch] if fused else self._backward[virtual_microbatch])
            self.order.append(int(Kind.BW if fused else Kind.B) * self._virtual_microbatches + virtual_microbatch)
            self._free += size
            self._give[self._last[virtual_microbatch]] -= size
        else:
            self._clock = start + self._forward[virtual_microbatch]
            self.order.append(int(Kind.F) * self._virtual_microbatches + virtual_microbatch)
            if self._has_backward[virtual_microbatch]:
                self._free -= size
                self._need[self._first[virtual_microbatch]] -= self._lean[virtual_microbatch]
                self._give[self._last[virtual_microbatch]] += size - self._lean[virtual_microbatch]
            else:
                self._passing_count[self._first[virtual_microbatch]] -= 1
        self._was_forward = not backward
        self._next = None
        return self._clock

    def _admitted(self, virtual_microbatch: int) -> bool:
        """Banker's rule: after this forward its sink and every earlier one can still finish in turn."""
        if self._unlimited:
            return True
        size, sink = self._size[virtual_microbatch], self._first[virtual_microbatch]
        if not self._has_backward[virtual_microbatch]:
            return bool(size <= self._free)
        room = coming = self._free
        for i in range(sink):
            wanted = max(self._need[i], self._passing[i]) if self._passing_count[i] else self._need[i]
            room = min(room, coming - wanted)
            coming += self._give[i] - self._need[i]
        return bool(size <= room and (not self._passing_count[sink] or size <= coming - self._passing[sink]))
