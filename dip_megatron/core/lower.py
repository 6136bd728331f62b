"""From orders of operations to actions: where each send, receive and wait stands.

Sends are ordered once, here. For each channel the receives are posted in the order of the sends, each about when its
sender starts to compute it (so that the data never waits for a buffer, and buffers do not pile up), and never later
than the operation that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .actions import Message
from .graph import Ints, StageGraph
from .kernels import lower_codes, messages_of
from .operations import Kind, StageKey
from .order import Schedule
from .plan import Payload, Plan, Predicted, SearchStatistics
from .simulate.kernels import pad_orders, simulate_compiled
from .simulate.reference import Timeline


def outgoing(graph: StageGraph, key: StageKey) -> tuple[Message, ...]:
    """Messages that an operation's end sets off, those between stages of one rank included."""
    s, p = graph.row_of(key), key.rank
    step = -1 if graph.row_reversed[s] else 1
    if key.kind == Kind.W:
        return ()
    if key.kind == Kind.F:
        if p != graph.exit_rank(s):
            targets = [graph.key(Kind.F, s, p + step)]
        else:
            targets = [graph.key(Kind.F, n, graph.entry_rank(n)) for n in graph.next_rows[s]]
        return tuple(Message(graph.key(Kind.F, s, p), t) for t in targets)
    if p != graph.entry_rank(s):
        back = [(s, p - step)]
    else:
        back = [(q, graph.exit_rank(q)) for q in graph.previous_rows[s]]
    source = graph.key(Kind.B, s, p)
    return tuple(Message(source, graph.key(Kind.B, q, r)) for q, r in back if graph.has_backward[q, r])


def incoming(graph: StageGraph, key: StageKey) -> tuple[Message, ...]:
    """Messages an operation waits for, those between stages of one rank included."""
    if key.kind == Kind.W:
        return ()
    kind = Kind.F if key.kind == Kind.F else Kind.B
    target = StageKey(kind, key.module, key.segment, key.unit, key.rank)
    sources = [k for k in graph.predecessors(target) if kind == Kind.F or k.kind == Kind.B]
    return tuple(Message(source, target) for source in sources)


def lower(graph: StageGraph, schedule: Schedule, timeline: Timeline | None = None) -> tuple[Ints, ...]:
    """Action codes of every rank. ``timeline`` (simulated if not given) only decides how early receives are posted."""
    timeline = timeline or simulate_compiled(graph, schedule)
    g = messages_of(graph)
    orders, lengths = pad_orders(schedule)
    start, end = np.zeros(orders.shape), np.zeros(orders.shape)
    for rank in range(graph.ranks):
        start[rank, : lengths[rank]] = timeline.start[rank]
        end[rank, : lengths[rank]] = timeline.end[rank]
    messages = 2 * g.edges
    codes = np.zeros((graph.ranks, orders.shape[1] + 2 * messages), dtype=np.int32)
    counts = np.zeros(graph.ranks, dtype=np.int32)

    def ints(size: int) -> Ints:
        return np.zeros(size, dtype=np.int32)

    lower_codes(
        g, orders, lengths, start, end, ints(messages + 1), ints(messages), ints(messages), np.zeros(messages),
        ints(2 * graph.ranks**2 + 1), ints(messages), ints(graph.ranks * (orders.shape[1] + 1)), ints(messages),
        codes, counts,
    )  # fmt: skip
    return tuple(codes[rank, : counts[rank]].copy() for rank in range(graph.ranks))


def make_plan(
    graph: StageGraph,
    schedule: Schedule,
    *,
    lower_bound: float,
    name: str = "dip",
    payloads: Mapping[tuple[int, ...], Payload] | None = None,
    search: SearchStatistics | None = None,
) -> Plan:
    """Project the graph on the chosen strategies, simulate, lower. Raises DeadlockError if the orders can't end."""
    projected = graph.project(schedule.strategy)
    single = Schedule(schedule.orders, np.zeros((graph.rows, graph.ranks), dtype=np.int8))
    timeline = simulate_compiled(projected, single)
    predicted = Predicted(
        timeline.iteration_time, lower_bound, timeline.bubble_ratio, tuple(float(b) for b in timeline.peak_bytes)
    )
    return Plan(
        projected, single, lower(projected, single, timeline), predicted, name, dict(payloads or {}),
        search or SearchStatistics(),
    )  # fmt: skip
