"""The strict verifier: a plan that could hang, lose a gradient or break its memory limit never runs.

The replay uses rendezvous semantics, the strictest any transport has: a send ends only when its receive is posted, per
channel, in order, as NCCL matches them (it ignores tags).
"""

from __future__ import annotations

from collections import defaultdict

from ..simulate.reference import simulate
from .actions import Action, Channel, Communicate, CommunicationKind, Compute, Message
from .graph import StageGraph
from .lower import incoming, outgoing
from .order import check_complete
from .plan import Plan


class PlanError(ValueError):
    """A plan that must not run; the message names the first fault and its place."""


def verify(plan: Plan) -> None:
    """Raise PlanError at the first fault: completeness, order, messages, deadlock, memory, payloads, prediction."""
    graph = plan.graph
    fault = check_complete(graph, plan.schedule)
    if fault:
        raise PlanError(fault)
    if len(plan.actions) != graph.ranks:
        raise PlanError(f"{len(plan.actions)} ranks have actions, the graph has {graph.ranks}")
    for rank, actions in enumerate(plan.actions):
        _check_rank(plan, rank, actions)
    replay(graph, plan.actions)
    for rank, peak in enumerate(simulate(graph, plan.schedule).peak_bytes):
        limit = graph.memory_limit[rank]
        if peak > limit * (1 + 1e-9):
            raise PlanError(f"rank {rank}: needs {peak:.0f} bytes, {peak - limit:.0f} over its limit of {limit:.0f}")
    if plan.predicted.iteration_time < plan.predicted.lower_bound * (1 - 1e-9):
        raise PlanError(
            f"predicted {plan.predicted.iteration_time} s lies under the bound {plan.predicted.lower_bound} s"
        )
    if plan.payloads:
        for s in range(graph.rows):
            pairs = ([(s, s)] if graph.ranks > 1 else []) + [(s, n) for n in graph.next_rows[s]]
            for pair in pairs:
                if pair not in plan.payloads:
                    raise PlanError(f"no payload for row {pair[0]} to row {pair[1]}")


def _check_rank(plan: Plan, rank: int, actions: tuple[Action, ...]) -> None:
    """The rank's actions are its order's operations, and each has begun and awaited just the messages it must."""
    graph = plan.graph
    computed = [a.key for a in actions if isinstance(a, Compute)]
    if computed != plan.schedule.operations(graph, rank):
        raise PlanError(f"rank {rank}: its actions are not in the order of its operations")
    posted: set[Message] = set()
    waited: set[Message] = set()
    sent: set[Message] = set()
    settled: set[Message] = set()
    due: set[Message] = set()
    for i, action in enumerate(actions):
        place = f"rank {rank}, action {i} ({action})"
        if isinstance(action, Compute):
            s = graph.row_of(action.key)
            if action.strategy != graph.strategy_name(0, s, rank):
                raise PlanError(f"{place}: strategy differs from the graph's {graph.strategy_name(0, s, rank)!r}")
            for message in incoming(graph, action.key):
                if message.channel.source != rank and message not in waited:
                    raise PlanError(f"{place}: runs before it has awaited {message}")
            due.update(m for m in outgoing(graph, action.key) if m.channel.target != rank)
            continue
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
            waited.add(message)
        else:
            if message not in sent:
                raise PlanError(f"{place}: waits for a send that has not begun")
            settled.add(message)
    for message in sorted(due - sent):
        raise PlanError(f"rank {rank}: never sends {message}")
    for message in sorted(posted - waited):
        raise PlanError(f"rank {rank}: never awaits {message}")
    for message in sorted(sent - settled):
        raise PlanError(f"rank {rank}: never awaits its send {message}")


_SENDING = (CommunicationKind.ISEND, CommunicationKind.WAIT_ISEND)


def replay(graph: StageGraph, actions: tuple[tuple[Action, ...], ...]) -> None:
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
