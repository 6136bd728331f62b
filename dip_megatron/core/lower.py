"""From orders of operations to actions: where each send, receive and wait stands.

Sends are ordered once, here. For each channel the receives are posted in the order of the sends, each about when its
sender starts to compute it (so that the data never waits for a buffer, and buffers do not pile up), and never later
than the operation that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .actions import Message
from .graph import Ints, OperationGraph
from .kernels import lower_codes, make_lowering, messages_of
from .operations import Kind, Operation
from .order import Schedule
from .plan import Payload, Plan, Predicted, SearchStatistics
from .simulate.kernels import pad_orders, simulate_compiled
from .simulate.reference import Timeline


def outgoing(graph: OperationGraph, operation: Operation) -> tuple[Message, ...]:
    """Messages that an operation's end sets off, those between stages of one rank included."""
    s, p = graph.virtual_microbatch_of(operation), operation.rank
    source = graph.operation(_gradient_or_output(operation.kind), s, p)
    readers = graph.outputs(operation.kind, s, p)
    return tuple(Message(source, graph.operation(d.kind, d.virtual_microbatch, d.rank)) for d in readers)


def incoming(graph: OperationGraph, operation: Operation) -> tuple[Message, ...]:
    """Messages an operation waits for, those between stages of one rank included."""
    if operation.kind == Kind.W:
        return ()
    s, p, kind = graph.virtual_microbatch_of(operation), operation.rank, _gradient_or_output(operation.kind)
    target = graph.operation(kind, s, p)
    senders = [d for d in graph.inputs(kind, s, p) if d.kind == kind]
    return tuple(Message(graph.operation(kind, d.virtual_microbatch, d.rank), target) for d in senders)


def _gradient_or_output(kind: Kind) -> Kind:
    """The kind that a message names at both ends."""
    return Kind.F if kind == Kind.F else Kind.B


def lower(graph: OperationGraph, schedule: Schedule, timeline: Timeline | None = None) -> tuple[Ints, ...]:
    """Action codes of every rank. ``timeline`` (simulated if not given) only decides how early receives are posted."""
    timeline = timeline or simulate_compiled(graph, schedule)
    g = messages_of(graph)
    orders, lengths = pad_orders(schedule)
    start, end = np.zeros(orders.shape), np.zeros(orders.shape)
    for rank in range(graph.ranks):
        start[rank, : lengths[rank]] = timeline.start[rank]
        end[rank, : lengths[rank]] = timeline.end[rank]
    codes = np.zeros((graph.ranks, orders.shape[1] + 4 * g.edges), dtype=np.int32)
    counts = np.zeros(graph.ranks, dtype=np.int32)
    lower_codes(g, make_lowering(g, orders, lengths, start, end), codes, counts)
    return tuple(codes[rank, : counts[rank]].copy() for rank in range(graph.ranks))


def make_plan(
    graph: OperationGraph,
    schedule: Schedule,
    *,
    lower_bound: float,
    name: str = "dip",
    payloads: Mapping[tuple[int, ...], Payload] | None = None,
    search: SearchStatistics | None = None,
) -> Plan:
    """Project the graph on the chosen strategies, simulate, lower. Raises DeadlockError if the orders can't end."""
    projected = graph.project(schedule.strategy)
    single = Schedule(schedule.orders, np.zeros((graph.virtual_microbatches, graph.ranks), dtype=np.int8))
    timeline = simulate_compiled(projected, single)
    predicted = Predicted(
        timeline.iteration_time, lower_bound, timeline.bubble_ratio, tuple(float(b) for b in timeline.peak_bytes)
    )
    return Plan(
        graph=projected,
        schedule=single,
        codes=lower(projected, single, timeline),
        predicted=predicted,
        name=name,
        payloads=dict(payloads or {}),
        search=search or SearchStatistics(),
    )
