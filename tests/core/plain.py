"""Lowering and verifying in plain Python: slow, readable, and what the compiled forms must equal."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict

from dip_megatron.core import (
    Action,
    Channel,
    Communicate,
    CommunicationKind,
    Compute,
    Message,
    OperationGraph,
    Reduce,
    Schedule,
)
from dip_megatron.core.lower import incoming, outgoing
from dip_megatron.core.simulate import Timeline, simulate
from dip_megatron.core.verify import PlanError


def lower(
    graph: OperationGraph, schedule: Schedule, timeline: Timeline | None = None
) -> tuple[tuple[Action, ...], ...]:
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
            s = graph.virtual_microbatch_of(key)
            actions.append(Compute(key, graph.strategy_name(int(schedule.strategy[s, rank]), s, rank)))
            for message in outgoing(graph, key):
                if message.channel.target != rank:
                    actions.append(Communicate(CommunicationKind.ISEND, message))
                    sent.append(message)
        actions += [Communicate(CommunicationKind.WAIT_ISEND, m) for m in sent]
        lowered.append(tuple(actions))
    return tuple(lowered)


def check(graph: OperationGraph, schedule: Schedule, actions: tuple[tuple[Action, ...], ...]) -> None:
    """Raise PlanError where actions don't follow the schedule, don't match, or could hang."""
    for rank, line in enumerate(actions):
        check_rank(graph, schedule, rank, line)
    replay(graph, actions)


def check_rank(graph: OperationGraph, schedule: Schedule, rank: int, actions: tuple[Action, ...]) -> None:
    """The rank's actions are its order's operations, and each has begun and awaited just the messages it must."""
    computed = [a.operation for a in actions if isinstance(a, Compute)]
    if computed != schedule.operations(graph, rank):
        raise PlanError(f"rank {rank}: its actions are not in the order of its operations")
    posted: set[Message] = set()
    waited: set[Message] = set()
    sent: set[Message] = set()
    settled: set[Message] = set()
    due: set[Message] = set()
    for i, action in enumerate(actions):
        place = f"rank {rank}, action {i} ({action})"
        if isinstance(action, Compute):
            s = graph.virtual_microbatch_of(action.operation)
            if action.strategy != graph.strategy_name(0, s, rank):
                raise PlanError(f"{place}: strategy differs from the graph's {graph.strategy_name(0, s, rank)!r}")
            for message in incoming(graph, action.operation):
                if message.channel.source != rank and message not in waited:
                    raise PlanError(f"{place}: runs before it has awaited {message}")
            due.update(m for m in outgoing(graph, action.operation) if m.channel.target != rank)
            continue
        if isinstance(action, Reduce):
            raise PlanError(f"{place}: in a plan that is coupled with none")
        message, kind = action.message, action.kind
        own = message.channel.source if kind in _SENDING else message.channel.target
        if own != rank:
            raise PlanError(f"{place}: is another rank's")
        if kind == CommunicationKind.ISEND:
            if message not in due or message in sent:
                raise PlanError(f"{place}: sends what is not there, or sends it twice")
            sent.add(message)
        elif kind == CommunicationKind.IRECV:
            if message in posted:
                raise PlanError(f"{place}: receives it twice")
            posted.add(message)
        elif kind == CommunicationKind.WAIT_IRECV:
            if message not in posted:
                raise PlanError(f"{place}: waits for a receive that is not posted")
            if message in waited:
                raise PlanError(f"{place}: waits twice")
            waited.add(message)
        else:
            if message not in sent or message in settled:
                raise PlanError(f"{place}: waits for a send that has not begun")
            settled.add(message)
    for message in sorted(due - sent):
        raise PlanError(f"rank {rank}: never sends {message}")
    for message in sorted(posted - waited):
        raise PlanError(f"rank {rank}: never awaits {message}")
    for message in sorted(sent - settled):
        raise PlanError(f"rank {rank}: never awaits its send {message}")


_SENDING = (CommunicationKind.ISEND, CommunicationKind.WAIT_ISEND)


def replay(graph: OperationGraph, actions: tuple[tuple[Action, ...], ...]) -> None:
    """Run the actions of all ranks under rendezvous semantics. Raises PlanError if they don't end or don't match."""
    sends: dict[Channel, list[Message]] = defaultdict(list)
    receives: dict[Channel, list[Message]] = defaultdict(list)
    matched: set[Message] = set()
    place = [0] * graph.ranks

    def match(channel: Channel, i: int) -> None:
        if i < min(len(sends[channel]), len(receives[channel])):
            sent, received = sends[channel][i], receives[channel][i]
            if sent != received:
                raise PlanError(f"channel {channel}: {sent} is sent where {received} is received")
            matched.add(sent)

    progressed = True
    while progressed:
        progressed = False
        for rank, line in enumerate(actions):
            while place[rank] < len(line):
                action = line[place[rank]]
                if isinstance(action, Communicate):
                    channel = action.message.channel
                    if action.kind == CommunicationKind.ISEND:
                        sends[channel].append(action.message)
                        match(channel, len(sends[channel]) - 1)
                    elif action.kind == CommunicationKind.IRECV:
                        receives[channel].append(action.message)
                        match(channel, len(receives[channel]) - 1)
                    elif action.message not in matched:
                        break
                place[rank] += 1
                progressed = True
    stuck = [f"rank {r} at action {i} ({actions[r][i]})" for r, i in enumerate(place) if i < len(actions[r])]
    if stuck:
        raise PlanError("the plan deadlocks: " + "; ".join(stuck))
    for channel in sorted(set(sends) | set(receives)):
        if len(sends[channel]) != len(receives[channel]):
            raise PlanError(f"channel {channel}: {len(sends[channel])} sends for {len(receives[channel])} receives")
