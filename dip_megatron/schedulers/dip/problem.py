"""A stage graph as the list scheduler sees it: memory in whole numbers, and what each microbatch will claim of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.graph import Floats, Ints, OperationGraph
from ...core.simulate.kernels import BACKWARD, FORWARD, FUSED, GraphArrays, graph_arrays

Longs = NDArray[np.int64]
UNBOUNDED = 1 << 60


class Problem(NamedTuple):
    """What :func:`.dispatch.dispatch` needs to know of a graph.

    Memory is counted in integers (``bytes_per_count`` bytes each), so that sums are exact; ``capacity`` ``[P]`` is the
    limit less the static bytes. Units that are connected form a *group* (as a rule a microbatch); a unit that feeds
    nothing is a *sink*. Sinks are numbered group by group: group g has sinks ``sink_start[g]`` to
    ``sink_start[g + 1]``. Virtual microbatch s is first needed by sink ``first[s]`` and last by ``last[s]``, when sinks
    are worked off in that order. ``reservation`` ``[K, P]`` is what sink k adds with the leanest strategies, ``freed``
    ``[K, P]`` what its end gives back, ``passing`` ``[K, P]`` the largest of its stages without backward
    (``passing_count`` of them), which hold memory only while they run. ``backbone`` ``[S]`` marks the virtual
    microbatches of modules that feed no other; ``least`` ``[P]`` is the smallest forward of a rank (0 if some hold
    memory only while they run); ``unit`` ``[S]`` is the unit of each;
    ``horizon`` is the seconds of the rank with the most work.
    """

    graph: GraphArrays
    bytes_per_count: float
    activation: Longs
    deferred_activation: Longs
    lean: Longs
    capacity: Longs
    bounded: NDArray[np.bool_]
    groups: int
    group: Ints
    sink_start: Ints
    first: Ints
    last: Ints
    reservation: Longs
    freed: Longs
    passing: Longs
    passing_count: Longs
    backbone: NDArray[np.bool_]
    least: Longs
    unit: Ints
    horizon: float


def make_problem(graph: OperationGraph) -> Problem:
    """Lay out ``graph`` for the list scheduler."""
    g = graph_arrays(graph)
    virtual_microbatches, ranks = g.virtual_microbatches, g.ranks
    per_count, activation, deferred_activation, capacity = _counted(graph, g)
    lean = activation.min(axis=0)
    # A stage that can hold nothing (all of it offloaded) still claims a count until its forward has run: a sink without
    # claims is one that has ended.
    lean = np.where(g.has_backward, np.maximum(lean, 1), lean)
    group_of_unit, sinks = _groups(graph)
    groups = max(group_of_unit) + 1
    group = np.array([group_of_unit[int(u)] for u in graph.unit_of], dtype=np.int32)
    upstream_units = _units_upstream(graph)
    number: dict[int, int] = {}
    sink_start = np.zeros(groups + 1, dtype=np.int32)
    for i in range(groups):
        for u in sinks[i]:
            number[u] = len(number)
        sink_start[i + 1] = len(number)
    first = np.full(virtual_microbatches, len(number), dtype=np.int32)
    last = np.full(virtual_microbatches, -1, dtype=np.int32)
    of_unit: list[list[int]] = [[] for _ in graph.units]
    for s in range(virtual_microbatches):
        of_unit[int(graph.unit_of[s])].append(s)
    for u, k in number.items():
        for v in _ancestors(upstream_units, u):
            for s in of_unit[v]:
                first[s] = min(int(first[s]), k)
                last[s] = max(int(last[s]), k)
    reservation = np.zeros((len(number), ranks), dtype=np.int64)
    freed = np.zeros_like(reservation)
    passing = np.zeros_like(reservation)
    passing_count = np.zeros_like(reservation)
    held = np.where(g.has_backward, lean, 0).reshape(virtual_microbatches, ranks)
    shown = np.where(g.has_backward, 0, lean).reshape(virtual_microbatches, ranks)
    passes = ~(g.has_backward | g.is_idle).reshape(virtual_microbatches, ranks)
    for s in range(virtual_microbatches):
        reservation[first[s]] += held[s]
        freed[last[s]] += held[s]
        passing[first[s]] = np.maximum(passing[first[s]], shown[s])
        passing_count[first[s]] += passes[s]
    most = np.maximum(activation, deferred_activation).max(axis=0).reshape(virtual_microbatches, ranks).sum(axis=0)
    least = np.where(g.has_backward, lean, np.where(g.is_idle, UNBOUNDED, 0))
    least = least.reshape(virtual_microbatches, ranks).min(axis=0)
    ends = {u.module for u in graph.units if not u.downstream and u.module not in _upstream_modules(graph)}
    backbone = np.array([graph.units[int(u)].module in ends for u in graph.unit_of], dtype=np.bool_)
    return Problem(
        graph=g,
        bytes_per_count=per_count,
        activation=activation,
        deferred_activation=deferred_activation,
        lean=lean,
        capacity=capacity,
        bounded=most > capacity,
        groups=groups,
        group=group,
        sink_start=sink_start,
        first=first,
        last=last,
        reservation=reservation,
        freed=freed,
        passing=passing,
        passing_count=passing_count,
        backbone=backbone,
        least=least,
        unit=np.array(graph.unit_of, dtype=np.int32),
        horizon=float(_work(g).max()),
    )


def _work(g: GraphArrays) -> Floats:
    """Seconds of work on each rank ``[P]`` with the fastest strategies."""
    whole = np.where(g.has_weight, g.duration[FUSED, 0], np.where(g.has_backward, g.duration[BACKWARD, 0], 0.0))
    total: Floats = (g.duration[FORWARD, 0] + whole).reshape(g.virtual_microbatches, g.ranks).sum(axis=0)
    return total


def _counted(graph: OperationGraph, g: GraphArrays) -> tuple[float, Longs, Longs, Longs]:
    """Bytes as integers. Whole bytes stay themselves; fractions are scaled by a power of two and rounded up, with a
    margin for the float sums of the simulator."""
    room = graph.memory_limit - graph.static_bytes
    finite = np.isfinite(room)
    exact = all(np.all(x == np.floor(x)) for x in (g.activation, g.deferred_activation, room[finite]))
    total = float(np.maximum(g.activation, g.deferred_activation).max(axis=0).sum()) + 1.0
    if exact and total < 2.0**52:
        per_count, margin = 1.0, 0
    else:
        top = max(total, float(np.max(np.abs(graph.memory_limit[finite]), initial=1.0)))
        per_count, margin = 2.0 ** (np.ceil(np.log2(top)) - 50), 4 * graph.virtual_microbatches
    activation = np.ceil(g.activation / per_count).astype(np.int64)
    deferred_activation = np.ceil(g.deferred_activation / per_count).astype(np.int64)
    capacity = np.full(graph.ranks, UNBOUNDED, dtype=np.int64)
    # A model described to need more bytes than an integer holds is short of memory like any other.
    counts = np.clip(np.floor(room[finite] / per_count), -float(UNBOUNDED), float(UNBOUNDED))
    capacity[finite] = counts.astype(np.int64) - margin
    return float(per_count), activation, deferred_activation, capacity


def _upstream_modules(graph: OperationGraph) -> set[str]:
    return {name for m in graph.modules for name in m.upstream}


def _units_upstream(graph: OperationGraph) -> list[list[int]]:
    upstream_units: list[list[int]] = [[] for _ in graph.units]
    for u in graph.units:
        for v in u.downstream:
            upstream_units[v].append(u.id)
    return upstream_units


def _ancestors(upstream_units: list[list[int]], unit: int) -> set[int]:
    seen, stack = {unit}, [unit]
    while stack:
        for q in upstream_units[stack.pop()]:
            if q not in seen:
                seen.add(q)
                stack.append(q)
    return seen


def _groups(graph: OperationGraph) -> tuple[list[int], list[list[int]]]:
    """Group of each unit, numbered by their first units; and each group's sinks, depth first from the lowest source,
    so that what several sinks share is held for as few of them as possible."""
    upstream_units = _units_upstream(graph)
    group = [-1] * len(graph.units)
    sinks: list[list[int]] = []
    for u in graph.units:
        if group[u.id] >= 0:
            continue
        members, stack = {u.id}, [u.id]
        while stack:
            v = stack.pop()
            for n in (*graph.units[v].downstream, *upstream_units[v]):
                if n not in members:
                    members.add(n)
                    stack.append(n)
        found: list[int] = []
        seen: set[int] = set()
        for source in sorted(v for v in members if not upstream_units[v]):
            stack = [source]
            while stack:
                v = stack.pop()
                if v in seen:
                    continue
                seen.add(v)
                if not graph.units[v].downstream:
                    found.append(v)
                stack.extend(reversed(graph.units[v].downstream))
        for v in members:
            group[v] = len(sinks)
        sinks.append(found)
    return group, sinks
