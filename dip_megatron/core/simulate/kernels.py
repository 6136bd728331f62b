"""The compiled simulator: the same numbers as :mod:`.reference`, bit for bit, about a thousand times faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..experts import NO_EXPERTS, ExpertLayers
from ..graph import Floats, Ints, OperationGraph
from ..operations import Kind
from ..order import Schedule
from .compiled import compiled, inlined
from .reference import DeadlockError, SetTimeline, Timeline, check_event, where_stuck

FORWARD, BACKWARD, WEIGHT, FUSED = int(Kind.F), int(Kind.B), int(Kind.W), int(Kind.BW)
DISAGREE = -1.0
"""Results of :func:`replay` from here down are no times: -1 - p, the members of an event disagree on rank p."""


class GraphArrays(NamedTuple):
    """The operation graphs of G >= 1 replicas for kernels, one replica after the other.

    *Line* ``g * P + p`` is rank p of replica g. *Node* ``base[g] + s * P + p`` stands for the operations of its virtual
    microbatch s there. ``virtual_microbatches`` are those of all replicas, ``nodes`` = N, and C the most memory
    strategies that a replica's operations have to choose from.

    ``duration`` ``[4 kinds, C, N]`` seconds; ``activation`` and ``deferred_activation`` ``[C, N]`` bytes. The forward
    of node n waits for nodes ``before[before_start[n]:before_start[n + 1]]``, each ``before_transfer`` seconds away;
    ``after`` is the same graph seen from the other side, which backwards wait for. ``chunk`` ``[N]`` is the number of
    the node's chunk where all replicas run its forward and its backward at once, -1 elsewhere. ``static_bytes``
    ``[G * P]``.
    """

    virtual_microbatches: int
    ranks: int
    replicas: int
    candidates: int
    nodes: int
    base: Ints
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
    chunk: Ints
    static_bytes: Floats


def graph_arrays(*graphs: OperationGraph, experts: ExpertLayers = NO_EXPERTS) -> GraphArrays:
    """Lay out the graphs of replicas, which meet in the layers with ``experts``, for the kernels."""
    ranks, candidates = graphs[0].ranks, max(g.candidates for g in graphs)
    base = np.cumsum([0, *(g.virtual_microbatches * ranks for g in graphs)]).astype(np.int32)
    nodes = int(base[-1])

    def nodewise(name: str) -> Floats:
        out = np.zeros((candidates, nodes))
        for g, graph in enumerate(graphs):
            values = getattr(graph, name).reshape(graph.candidates, -1)
            out[: graph.candidates, base[g] : base[g + 1]] = values
        return out

    def joined(name: str, dtype: type) -> NDArray[Any]:
        return np.concatenate([getattr(g, name).reshape(-1) for g in graphs]).astype(dtype)

    edges = [g.edges for g in graphs]
    before = np.cumsum([0, *(len(e.source) for e in edges)])

    def starts(name: str) -> Ints:
        parts = [getattr(e, name)[:-1] + count for e, count in zip(edges, before, strict=False)]
        return np.concatenate([*parts, before[-1:]]).astype(np.int32)

    def ends(name: str, after: bool) -> Ints:
        parts = [getattr(e, name)[e.after if after else slice(None)] + n for e, n in zip(edges, base, strict=False)]
        return np.concatenate(parts).astype(np.int32)

    chunk = np.full(nodes, -1, dtype=np.int32)
    if experts.modules:
        chunk = np.concatenate([experts.chunks(g).reshape(-1) for g in graphs])
    return GraphArrays(
        virtual_microbatches=nodes // ranks,
        ranks=ranks,
        replicas=len(graphs),
        candidates=candidates,
        nodes=nodes,
        base=base,
        duration=np.stack([nodewise(name) for name in ("forward", "backward", "weight", "fused")]),
        activation=nodewise("activation"),
        deferred_activation=nodewise("deferred_activation"),
        before_start=starts("before_start"),
        before=ends("source", after=False),
        before_transfer=np.concatenate([e.transfer for e in edges]).astype(np.float64),
        after_start=starts("after_start"),
        after=ends("target", after=True),
        after_transfer=np.concatenate([e.transfer[e.after] for e in edges]).astype(np.float64),
        has_backward=joined("has_backward", np.bool_),
        has_weight=joined("has_weight", np.bool_),
        is_idle=joined("is_idle", np.bool_),
        chunk=chunk,
        static_bytes=joined("static_bytes", np.float64),
    )


def pad_orders(*schedules: Schedule) -> tuple[Ints, Ints]:
    """The orders of all replicas as one array ``[G * P, longest]`` and their lengths ``[G * P]``."""
    orders = [order for schedule in schedules for order in schedule.orders]
    lengths = np.array([len(o) for o in orders], dtype=np.int32)
    padded = np.zeros((len(lengths), max(1, int(lengths.max(initial=0)))), dtype=np.int32)
    for line, order in enumerate(orders):
        padded[line, : len(order)] = order
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


@inlined
def _run_event(
    g: GraphArrays, p: int, orders: Ints, strategy: NDArray[np.int8], start: Floats, end: Floats, place: Ints,
    forward_end: Floats, backward_end: Floats,
) -> float:  # fmt: skip
    """Run the operations at which all replicas wait on rank ``p`` as one event: it begins when the last member is
    ready, and lasts as long as the longest. Returns its end, or :data:`DISAGREE` - p."""
    begin, length, chunk, forward = 0.0, 0.0, -1, False
    for replica in range(g.replicas):
        line = replica * g.ranks + p
        base = g.base[replica]
        rows = (g.base[replica + 1] - base) // g.ranks
        code = orders[line, ~place[line]]
        kind = code // rows
        n = base + (code - kind * rows) * g.ranks + p
        if replica == 0:
            chunk, forward = g.chunk[n], kind == FORWARD
        elif g.chunk[n] != chunk or (kind == FORWARD) != forward:
            return DISAGREE - p
        begin = max(begin, start[line, ~place[line]])
        length = max(length, g.duration[kind, strategy[n], n])
    for replica in range(g.replicas):
        line = replica * g.ranks + p
        base = g.base[replica]
        rows = (g.base[replica + 1] - base) // g.ranks
        i = ~place[line]
        code = orders[line, i]
        kind = code // rows
        n = base + (code - kind * rows) * g.ranks + p
        start[line, i], end[line, i] = begin, begin + length
        if kind == FORWARD:
            forward_end[n] = begin + length
        else:
            backward_end[n] = begin + length
        place[line] = i + 1
    return begin + length


@compiled
def replay(
    g: GraphArrays, orders: Ints, lengths: Ints, strategy: NDArray[np.int8], start: Floats, end: Floats, place: Ints,
    forward_end: Floats, backward_end: Floats,
) -> float:  # fmt: skip
    """Start and end of every operation when each rank runs its order as early as its inputs, and the other members of
    an event, allow.

    Returns the iteration time; nan if the orders deadlock; or :data:`DISAGREE` - p if replicas run different chunks or
    directions at one event of rank p. Then ``place`` says where each line stands: ``~place`` where it waits for others.

    ``orders`` ``[G * P, L]`` are each replica's codes ``kind * S + s``; ``strategy`` ``[N]``; ``start``, ``end``
    ``[G * P, L]``, ``place`` ``[G * P]``, ``forward_end`` and ``backward_end`` ``[N]`` are overwritten.
    """
    ranks, replicas = g.ranks, g.replicas
    forward_end[:] = np.nan
    backward_end[:] = np.nan
    place[:] = 0
    remaining = 0
    for line in range(len(lengths)):
        remaining += lengths[line]
    latest = 0.0
    while remaining > 0:
        progressed = False
        for p in range(ranks):
            waiting = 0
            for replica in range(replicas):
                line = replica * ranks + p
                i = place[line]
                if i < 0:
                    waiting += 1
                    continue
                base = g.base[replica]
                rows = (g.base[replica + 1] - base) // g.ranks
                held = False
                clock = end[line, i - 1] if i > 0 else 0.0
                while i < lengths[line]:
                    code = orders[line, i]
                    kind = code // rows
                    n = base + (code - kind * rows) * ranks + p
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
                    start[line, i] = ready
                    if g.chunk[n] >= 0 and kind != WEIGHT:
                        held = True
                        break
                    finish = ready + g.duration[kind, strategy[n], n]
                    end[line, i] = finish
                    clock = finish
                    if kind == FORWARD:
                        forward_end[n] = finish
                    elif kind != WEIGHT:
                        backward_end[n] = finish
                    i += 1
                    remaining -= 1
                    progressed = True
                place[line] = ~i if held else i
                waiting += held
                latest = max(latest, clock)
            if waiting == replicas:
                finish = _run_event(g, p, orders, strategy, start, end, place, forward_end, backward_end)
                if finish <= DISAGREE:
                    return finish
                latest = max(latest, finish)
                remaining -= replicas
                progressed = True
        if not progressed:
            return np.nan
    return latest


@compiled
def peak_memory(g: GraphArrays, line: int, order: Ints, length: int, strategy: NDArray[np.int8]) -> float:
    """Peak bytes of a rank of a replica when it runs ``order``, static bytes included; it depends on that alone."""
    replica, p = line // g.ranks, line % g.ranks
    base = g.base[replica]
    rows = (g.base[replica + 1] - base) // g.ranks
    held = g.static_bytes[line]
    peak = held
    for i in range(length):
        code = order[i]
        kind = code // rows
        n = base + (code - kind * rows) * g.ranks + p
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


def simulate_set_compiled(
    graphs: Sequence[OperationGraph], schedules: Sequence[Schedule], experts: ExpertLayers = NO_EXPERTS,
    arrays: GraphArrays | None = None,
) -> SetTimeline:  # fmt: skip
    """:func:`.reference.simulate_set`, compiled.

    Args:
        graphs: One graph a replica.
        schedules: One schedule a replica.
        experts: The layers in which the replicas meet.
        arrays: ``graph_arrays(*graphs, experts=experts)`` if the caller has it at hand.

    Raises:
        DeadlockError: If the orders can't end.
        CouplingError: If replicas run different chunks or directions at one event.
    """
    g = graph_arrays(*graphs, experts=experts) if arrays is None else arrays
    orders, lengths = pad_orders(*schedules)
    strategy = np.concatenate([s.strategy.reshape(-1) for s in schedules])
    start, end = np.zeros(orders.shape), np.zeros(orders.shape)
    place = np.zeros(len(lengths), dtype=np.int32)
    time = replay(g, orders, lengths, strategy, start, end, place, np.empty(g.nodes), np.empty(g.nodes))
    if not time >= 0.0:
        places = np.where(place < 0, ~place, place).reshape(len(schedules), -1)
        if time <= DISAGREE:
            p = int(DISAGREE - time)
            check_event([s.operation(h, p, int(i[p])) for h, s, i in zip(graphs, schedules, places, strict=True)])
        raise DeadlockError(where_stuck(graphs, schedules, places.tolist()))
    replicas = []
    for replica, graph in enumerate(graphs):
        lines = range(replica * g.ranks, (replica + 1) * g.ranks)
        ends = tuple(end[line, : lengths[line]].copy() for line in lines)
        replicas.append(
            Timeline(
                tuple(start[line, : lengths[line]].copy() for line in lines),
                ends,
                np.array([peak_memory(g, line, orders[line], int(lengths[line]), strategy) for line in lines]),
                max((float(of[-1]) for of in ends if len(of)), default=0.0),
                graph.overhead,
            )
        )
    return SetTimeline(tuple(replicas), float(time))


def simulate_compiled(graph: OperationGraph, schedule: Schedule, arrays: GraphArrays | None = None) -> Timeline:
    """:func:`simulate_set_compiled` of one replica."""
    return simulate_set_compiled((graph,), (schedule,), arrays=arrays).replicas[0]


def fit_in_memory(graphs: Sequence[OperationGraph], schedules: Sequence[Schedule]) -> bool:
    """Whether every rank of every replica stays within its memory.

    Args:
        graphs: One graph a replica.
        schedules: One schedule a replica.
    """
    peaks = [simulate_compiled(g, s).peak_bytes for g, s in zip(graphs, schedules, strict=True)]
    return all(bool(np.all(peak <= g.memory_limit)) for peak, g in zip(peaks, graphs, strict=True))
