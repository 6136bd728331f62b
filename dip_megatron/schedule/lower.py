"""From orders of operations to actions: where each send, receive and wait stands.

Sends are ordered once, here. For each channel the receives are posted in the order of the sends, each about when its
sender starts to compute it (so that the data never waits for a buffer, and buffers do not pile up), and never later
than the operation that needs it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from ..simulate.reference import Timeline, simulate
from .actions import Action, Channel, Communicate, CommunicationKind, Compute, Message
from .graph import StageGraph
from .keys import Kind, StageKey
from .order import Schedule
from .plan import Payload, Plan, Predicted, SearchStatistics


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


def lower(graph: StageGraph, schedule: Schedule, timeline: Timeline | None = None) -> tuple[tuple[Action, ...], ...]:
    """Actions of every rank. ``timeline`` (simulated if not given) only decides how early receives are posted."""
    timeline = timeline or simulate(graph, schedule)
    keys = [schedule.operations(graph, rank) for rank in range(graph.ranks)]
    sends: dict[Channel, list[tuple[Message, float]]] = defaultdict(list)
    needed_at: list[dict[Message, int]] = [{} for _ in range(graph.ranks)]
    for rank, line in enumerate(keys):
        for i, key in enumerate(line):
            for message in incoming(graph, key):
                if message.channel.source != rank:
                    needed_at[rank][message] = i
            for message in outgoing(graph, key):
                if message.channel.target != rank:
                    sends[message.channel].append((message, float(timeline.start[rank][i])))

    receives: list[dict[int, list[Message]]] = [defaultdict(list) for _ in range(graph.ranks)]
    for channel in sorted(sends):
        messages = sends[channel]
        target = channel.target
        ends: list[float] = timeline.end[target].tolist()
        latest = len(keys[target])
        places = []
        for message, begun in reversed(messages):
            latest = min(latest, needed_at[target][message], bisect_right(ends, begun))
            places.append(latest)
        for (message, _), place in zip(messages, reversed(places), strict=True):
            receives[target][place].append(message)

    lowered = []
    for rank, line in enumerate(keys):
        actions: list[Action] = []
        sent: list[Message] = []
        for i, key in enumerate(line):
            actions += [Communicate(CommunicationKind.IRECV, m) for m in receives[rank].get(i, ())]
            actions += [
                Communicate(CommunicationKind.WAIT_IRECV, m)
                for m in incoming(graph, key)
                if m.channel.source != rank
            ]  # fmt: skip
            s = graph.row_of(key)
            actions.append(Compute(key, graph.strategy_name(int(schedule.strategy[s, rank]), s, rank)))
            for message in outgoing(graph, key):
                if message.channel.target != rank:
                    actions.append(Communicate(CommunicationKind.ISEND, message))
                    sent.append(message)
        actions += [Communicate(CommunicationKind.WAIT_ISEND, m) for m in sent]
        lowered.append(tuple(actions))
    return tuple(lowered)


def make_plan(
    graph: StageGraph,
    schedule: Schedule,
    *,
    lower_bound: float,
    name: str = "dip",
    payloads: Mapping[tuple[int, int], Payload] | None = None,
    search: SearchStatistics | None = None,
) -> Plan:
    """Project the graph on the chosen strategies, simulate, lower. Raises DeadlockError if the orders can't end."""
    projected = graph.project(schedule.strategy)
    single = Schedule(schedule.orders, np.zeros((graph.rows, graph.ranks), dtype=np.int8))
    timeline = simulate(projected, single)
    predicted = Predicted(
        timeline.iteration_time, lower_bound, timeline.bubble_ratio, tuple(float(b) for b in timeline.peak_bytes)
    )
    return Plan(
        projected, single, lower(projected, single, timeline), predicted, name, dict(payloads or {}),
        search or SearchStatistics(),
    )  # fmt: skip
