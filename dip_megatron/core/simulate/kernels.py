"""The compiled simulator: the same numbers as :mod:`.reference`, bit for bit, about a thousand times faster."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..graph import Floats, Ints, OperationGraph
from ..operations import Kind
from ..order import Schedule
from .compiled import compiled, inlined
from .reference import DeadlockError, Timeline

FORWARD, BACKWARD, WEIGHT, FUSED = int(Kind.F), int(Kind.B), int(Kind.W), int(Kind.BW)


class GraphArrays(NamedTuple):
    """A stage graph for kernels. A *node* is stage ``s * P + rank``; N = S * P of them.

    ``duration`` ``[4 kinds, C, N]`` seconds; ``activation`` and ``deferred_activation`` ``[C, N]`` bytes. The forward
    of node n waits for nodes ``before[before_start[n]:before_start[n + 1]]``, each ``before_transfer`` seconds away;
    ``after`` is the same graph seen from the other side, which backwards wait for.
    """

    virtual_microbatches: int
    ranks: int
    candidates: int
    duration: Floats
    activation: Floats
    deferred_activation: Floats
    before_start: Ints
    before: Ints
    before_transfer: Floats
    after_start: Ints
    after: Ints
    after_transfer: Floats
    has_backward: NDArray[np.bool_]
    has_weight: NDArray[np.bool_]
    is_idle: NDArray[np.bool_]
    static_bytes: Floats


def graph_arrays(graph: OperationGraph) -> GraphArrays:
    """Lay out ``graph`` for the kernels."""
    virtual_microbatches, ranks, edges = graph.virtual_microbatches, graph.ranks, graph.edges
    nodes = virtual_microbatches * ranks
    c = graph.candidates

    def nodewise(array: Floats) -> Floats:
        return np.ascontiguousarray(array, dtype=np.float64).reshape(c, nodes)

    duration = np.ascontiguousarray(
        np.stack([nodewise(x) for x in (graph.forward, graph.backward, graph.weight, graph.fused)])
    )
    return GraphArrays(
        virtual_microbatches=virtual_microbatches,
        ranks=ranks,
        candidates=c,
        duration=duration,
        activation=nodewise(graph.activation),
        deferred_activation=nodewise(graph.deferred_activation),
        before_start=edges.before_start,
        before=edges.source,
        before_transfer=edges.transfer,
        after_start=edges.after_start,
        after=edges.target[edges.after],
        after_transfer=edges.transfer[edges.after],
        has_backward=np.ascontiguousarray(graph.has_backward.reshape(nodes)),
        has_weight=np.ascontiguousarray(graph.has_weight.reshape(nodes)),
        is_idle=np.ascontiguousarray(graph.is_idle.reshape(nodes)),
        static_bytes=graph.static_bytes.astype(np.float64),
    )


def pad_orders(schedule: Schedule) -> tuple[Ints, Ints]:
    """The orders as one array ``[P, longest]`` and their lengths ``[P]``."""
    lengths = np.array([len(o) for o in schedule.orders], dtype=np.int32)
    padded = np.zeros((len(lengths), max(1, int(lengths.max(initial=0)))), dtype=np.int32)
    for p, order in enumerate(schedule.orders):
        padded[p, : len(order)] = order
    return padded, lengths


class Edges(Protocol):
    """The edges of :class:`GraphArrays`, and of whatever else nodes wait along."""

    @property
    def before_start(self) -> Ints: ...
    @property
    def before(self) -> Ints: ...
    @property
    def before_transfer(self) -> Floats: ...
    @property
    def after_start(self) -> Ints: ...
    @property
    def after(self) -> Ints: ...
    @property
    def after_transfer(self) -> Floats: ...


@inlined
def forward_ready(g: Edges, n: int, forward_end: Floats, ready: float) -> float:
    """When a forward's last input is there, at ``ready`` seconds at the earliest; nan if one isn't known yet."""
    for e in range(g.before_start[n], g.before_start[n + 1]):
        at = forward_end[g.before[e]] + g.before_transfer[e]
        if not at <= ready:
            ready = at
            if np.isnan(at):
                break
    return ready


@inlined
def backward_ready(g: Edges, n: int, backward_end: Floats, ready: float) -> float:
    """The same for the gradients that a backward takes; that its own forward has run isn't looked at."""
    for e in range(g.after_start[n], g.after_start[n + 1]):
        at = backward_end[g.after[e]] + g.after_transfer[e]
        if not at <= ready:
            ready = at
            if np.isnan(at):
                break
    return ready


@compiled
def replay(
    g: GraphArrays, orders: Ints, lengths: Ints, strategy: NDArray[np.int8], start: Floats, end: Floats, place: Ints,
    forward_end: Floats, backward_end: Floats,
) -> float:  # fmt: skip
    """Start and end of every operation when each rank runs its order as early as inputs allow; returns the iteration
    time, or nan if the orders deadlock (``place`` then says where each rank stands).

    ``orders`` ``[P, L]`` codes; ``strategy`` ``[N]``; ``start``, ``end`` ``[P, L]``, ``place`` ``[P]``, ``forward_end``
    and ``backward_end`` ``[N]`` are overwritten.
    """
    virtual_microbatches, ranks = g.virtual_microbatches, g.ranks
    forward_end[:] = np.nan
    backward_end[:] = np.nan
    place[:] = 0
    remaining = 0
    for p in range(ranks):
        remaining += lengths[p]
    latest = 0.0
    while remaining > 0:
        progressed = False
        for p in range(ranks):
            i = place[p]
            clock = end[p, i - 1] if i > 0 else 0.0
            while i < lengths[p]:
                code = orders[p, i]
                kind = code // virtual_microbatches
                n = (code - kind * virtual_microbatches) * ranks + p
                ready = clock
                if kind == FORWARD:
                    ready = forward_ready(g, n, forward_end, ready)
                elif kind == WEIGHT:
                    if not backward_end[n] <= ready:
                        ready = backward_end[n]
                else:
                    if not forward_end[n] <= ready:
                        ready = forward_end[n]
                    if not np.isnan(ready):
                        ready = backward_ready(g, n, backward_end, ready)
                if np.isnan(ready):
                    break
                finish = ready + g.duration[kind, strategy[n], n]
                start[p, i] = ready
                end[p, i] = finish
                clock = finish
                if kind == FORWARD:
                    forward_end[n] = finish
                elif kind != WEIGHT:
                    backward_end[n] = finish
                i += 1
                remaining -= 1
                progressed = True
            place[p] = i
            latest = max(latest, clock)
        if not progressed:
            return np.nan
    return latest


@compiled
def peak_memory(g: GraphArrays, p: int, order: Ints, length: int, strategy: NDArray[np.int8]) -> float:
    """Peak bytes of rank ``p`` when it runs ``order``, static bytes included; it depends on that order alone."""
    virtual_microbatches, ranks = g.virtual_microbatches, g.ranks
    held = g.static_bytes[p]
    peak = held
    for i in range(length):
        code = order[i]
        kind = code // virtual_microbatches
        n = (code - kind * virtual_microbatches) * ranks + p
        activation, deferred_activation = g.activation[strategy[n], n], g.deferred_activation[strategy[n], n]
        if kind == FORWARD:
            held += activation
            peak = max(peak, held)
            if not g.has_backward[n]:
                held -= activation
        elif kind == WEIGHT:
            held -= deferred_activation
        else:
            held -= activation
            if kind == BACKWARD and g.has_weight[n]:
                held += deferred_activation
                peak = max(peak, held)
    return float(peak)


def simulate_compiled(graph: OperationGraph, schedule: Schedule, arrays: GraphArrays | None = None) -> Timeline:
    """:func:`.reference.simulate`, compiled. ``arrays`` is ``graph_arrays(graph)`` if the caller has it at hand.

    Raises DeadlockError when the orders can't end.
    """
    g = graph_arrays(graph) if arrays is None else arrays
    orders, lengths = pad_orders(schedule)
    strategy = np.ascontiguousarray(schedule.strategy.reshape(-1))
    start, end = np.zeros(orders.shape), np.zeros(orders.shape)
    place = np.zeros(g.ranks, dtype=np.int32)
    nodes = g.virtual_microbatches * g.ranks
    time = replay(g, orders, lengths, strategy, start, end, place, np.empty(nodes), np.empty(nodes))
    if np.isnan(time):
        stuck = ", ".join(
            f"rank {p} at {schedule.operation(graph, p, int(place[p]))}"
            for p, o in enumerate(schedule.orders)
            if place[p] < len(o)
        )
        raise DeadlockError(f"the plan can't end: {stuck}")
    peak = np.array([peak_memory(g, p, orders[p], int(lengths[p]), strategy) for p in range(g.ranks)])
    return Timeline(
        tuple(start[p, : lengths[p]].copy() for p in range(g.ranks)),
        tuple(end[p, : lengths[p]].copy() for p in range(g.ranks)),
        peak,
        float(time),
        graph.overhead,
    )
