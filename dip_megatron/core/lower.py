"""From orders of operations to actions: where each send, receive and wait stands.

Sends are ordered once, here. For each channel the receives are posted in the order of the sends, each about when its
sender starts to compute it (so that the data never waits for a buffer, and buffers do not pile up), and never later
than the operation that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .actions import Message
from .experts import NO_EXPERTS, Coupled, ExpertLayers
from .graph import Ints, OperationGraph
from .kernels import lower_codes, make_lowering, messages_of
from .operations import Kind, Operation
from .order import Schedule
from .plan import Payload, Plan, Predicted, SearchStatistics
from .plan_set import PlanSet
from .reductions import place_reductions, with_reductions
from .simulate.kernels import pad_orders, simulate_compiled, simulate_set_compiled
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
    """:func:`make_plan_set` of one replica."""
    each = None if payloads is None else (payloads,)
    made = make_plan_set((graph,), (schedule,), lower_bound=lower_bound, name=name, payloads=each, search=search)
    return made.plans[0]


def make_plan_set(
    graphs: Sequence[OperationGraph],
    schedules: Sequence[Schedule],
    experts: ExpertLayers = NO_EXPERTS,
    *,
    lower_bound: float,
    name: str = "dip",
    payloads: Sequence[Mapping[tuple[int, ...], Payload]] | None = None,
    search: SearchStatistics | None = None,
) -> PlanSet:
    """Project the graphs on the chosen strategies, simulate all together, lower one by one; several replicas get places
    for the starts of their reductions.

    Args:
        graphs: One graph a replica.
        schedules: One schedule a replica.
        experts: The layers in which the replicas meet.
        lower_bound: Seconds below which no plans of the graphs can be.
        name: The schedule that made the plans.
        payloads: What each replica's messages carry, as in :class:`Plan`.
        search: How the schedules were found.

    Raises:
        DeadlockError: If the orders can't end.
        CouplingError: If replicas don't meet in the same order.
    """
    count = len(graphs)
    projected = [g.project(s.strategy) for g, s in zip(graphs, schedules, strict=True)]
    single = [Schedule(s.orders, np.zeros_like(s.strategy)) for s in schedules]
    timeline = simulate_set_compiled(projected, single, experts)
    codes = [lower(*replica) for replica in zip(projected, single, timeline.replicas, strict=True)]
    if count > 1:
        places = place_reductions(projected, single, [line.end for line in timeline.replicas])
        codes = [with_reductions(*replica) for replica in zip(projected, codes, places, strict=True)]
    return PlanSet(
        tuple(
            Plan(
                graph=projected[g],
                schedule=single[g],
                codes=codes[g],
                predicted=Predicted(
                    timeline.iteration_time, lower_bound, timeline.bubble_ratio(g),
                    tuple(float(b) for b in timeline.replicas[g].peak_bytes),
                ),
                name=name,
                payloads=dict(payloads[g]) if payloads else {},
                search=search or SearchStatistics(),
                coupled=Coupled(g, count, experts) if count > 1 else None,
            )
            for g in range(count)
        )
    )  # fmt: skip
