"""Compiled inner loops of lowering and verifying; :mod:`.lower` and :mod:`.verify` say what they are for.

Both speak the codes of :mod:`.codes`. A message from node ``a`` to node ``b`` (forwards) or back (gradients) belongs to
channel ``(source rank * P + target rank) * 2 + gradient``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .experts import ExpertLayers
from .graph import Floats, Ints, OperationGraph
from .operations import Kind
from .reductions import reduction_turns
from .simulate.compiled import compiled

FORWARD, WEIGHT = int(Kind.F), int(Kind.W)
ISEND, IRECV, WAIT_ISEND, WAIT_IRECV = 0, 1, 2, 3
POSTED, AWAITED, DUE, SENT, SETTLED = 1, 2, 4, 8, 16

(
    NO_FAULT, WRONG_ORDER, EARLY_COMPUTE, OTHER_RANK, BAD_SEND, BAD_RECEIVE, BAD_WAIT_RECEIVE, BAD_WAIT_SEND,
    NEVER_SENT, NEVER_AWAITED, NEVER_SETTLED, MISMATCH, DEADLOCK, UNMATCHED,
) = range(14)  # fmt: skip


class Messages(NamedTuple):
    """The messages of a graph: ``source`` and ``target`` ``[2E]`` are ranks; ``exists``: a gradient travels only to
    stages that have a backward. Edges as in :class:`.graph.Edges`."""

    virtual_microbatches: int
    ranks: int
    edges: int
    source: Ints
    target: Ints
    exists: NDArray[np.bool_]
    before_start: Ints
    after_start: Ints
    after: Ints


def messages_of(graph: OperationGraph) -> Messages:
    """Lay out the messages of ``graph``."""
    edges = graph.edges
    back, forth = edges.target % graph.ranks, edges.source % graph.ranks
    trains = graph.has_backward.reshape(-1)
    return Messages(
        virtual_microbatches=graph.virtual_microbatches,
        ranks=graph.ranks,
        edges=len(edges.source),
        source=np.concatenate([forth, back]).astype(np.int32),
        target=np.concatenate([back, forth]).astype(np.int32),
        exists=np.concatenate([np.ones(len(edges.source), dtype=np.bool_), trains[edges.source]]),
        before_start=edges.before_start,
        after_start=edges.after_start,
        after=edges.after,
    )


@compiled
def _incoming(g: Messages, code: int, rank: int, out: Ints) -> int:
    """Fill ``out`` with the messages an operation waits for; returns how many."""
    kind = code // g.virtual_microbatches
    n = (code - kind * g.virtual_microbatches) * g.ranks + rank
    count = 0
    if kind == FORWARD:
        for e in range(g.before_start[n], g.before_start[n + 1]):
            out[count] = e
            count += 1
    elif kind != WEIGHT:
        for i in range(g.after_start[n], g.after_start[n + 1]):
            out[count] = g.edges + g.after[i]
            count += 1
    return count


@compiled
def _outgoing(g: Messages, code: int, rank: int, out: Ints) -> int:
    """Fill ``out`` with the messages an operation's end sets off; returns how many."""
    kind = code // g.virtual_microbatches
    n = (code - kind * g.virtual_microbatches) * g.ranks + rank
    count = 0
    if kind == FORWARD:
        for i in range(g.after_start[n], g.after_start[n + 1]):
            out[count] = g.after[i]
            count += 1
    elif kind != WEIGHT:
        for e in range(g.before_start[n], g.before_start[n + 1]):
            if g.exists[g.edges + e]:
                out[count] = g.edges + e
                count += 1
    return count


class Lowering(NamedTuple):
    """What :func:`lower_codes` works on. ``orders``, ``lengths``, ``start`` and ``end`` (seconds) are the ranks' orders
    and their times, padded to arrays. The rest is work space: ``some`` holds any node's messages; ``needed_at``,
    ``place``, ``begun``, ``by_channel``, ``by_place`` ``[2E]``; ``channel_start`` ``[2PP + 1]``, zeros; ``slot``
    ``[P * (longest order + 1)]``, zeros."""

    orders: Ints
    lengths: Ints
    start: Floats
    end: Floats
    some: Ints
    needed_at: Ints
    place: Ints
    begun: Floats
    channel_start: Ints
    by_channel: Ints
    slot: Ints
    by_place: Ints


def make_lowering(g: Messages, orders: Ints, lengths: Ints, start: Floats, end: Floats) -> Lowering:
    """Work space for one lowering."""
    messages = 2 * g.edges

    def ints(size: int) -> Ints:
        return np.zeros(size, dtype=np.int32)

    return Lowering(
        orders=orders,
        lengths=lengths,
        start=start,
        end=end,
        some=ints(messages + 1),
        needed_at=ints(messages),
        place=ints(messages),
        begun=np.zeros(messages),
        channel_start=ints(2 * g.ranks**2 + 1),
        by_channel=ints(messages),
        slot=ints(g.ranks * (orders.shape[1] + 1)),
        by_place=ints(messages),
    )


@compiled
def _sort_sends(g: Messages, x: Lowering) -> None:
    """The remote messages of each channel, in the order of their sends; when each begins, and where it is needed."""
    channels = len(x.channel_start) - 1
    for fill in range(2):
        for rank in range(g.ranks):
            for i in range(x.lengths[rank]):
                code = x.orders[rank, i]
                for k in range(_outgoing(g, code, rank, x.some)):
                    m = x.some[k]
                    if g.target[m] == rank:
                        continue
                    channel = (rank * g.ranks + g.target[m]) * 2 + (1 if m >= g.edges else 0)
                    if fill == 0:
                        x.channel_start[channel + 1] += 1
                        x.begun[m] = x.start[rank, i]
                    else:
                        x.by_channel[x.channel_start[channel]] = m
                        x.channel_start[channel] += 1
                if fill == 0:
                    for k in range(_incoming(g, code, rank, x.some)):
                        x.needed_at[x.some[k]] = i
        if fill == 0:
            for channel in range(channels):
                x.channel_start[channel + 1] += x.channel_start[channel]
    for channel in range(channels, 0, -1):  # filling moved each start to its end
        x.channel_start[channel] = x.channel_start[channel - 1]
    x.channel_start[0] = 0


@compiled
def _place_receives(g: Messages, x: Lowering) -> None:
    """Where each receive is posted: when its send begins, before it is needed, in the order of the sends."""
    longest = x.orders.shape[1] + 1
    for channel in range(len(x.channel_start) - 1):
        target = (channel // 2) % g.ranks
        latest = x.lengths[target]
        for j in range(x.channel_start[channel + 1] - 1, x.channel_start[channel] - 1, -1):
            m = x.by_channel[j]
            low, high = 0, x.lengths[target]
            while low < high:
                middle = (low + high) >> 1
                if x.end[target, middle] <= x.begun[m]:
                    low = middle + 1
                else:
                    high = middle
            latest = min(latest, x.needed_at[m], low)
            x.place[m] = latest
            x.slot[target * longest + latest] += 1
    total = 0
    for i in range(len(x.slot)):
        here = x.slot[i]
        x.slot[i] = total
        total += here
    for j in range(total):
        m = x.by_channel[j]
        i = g.target[m] * longest + x.place[m]
        x.by_place[x.slot[i]] = m
        x.slot[i] += 1


@compiled
def lower_codes(g: Messages, x: Lowering, codes: Ints, counts: Ints) -> None:
    """Fill ``codes`` ``[P, .]`` and ``counts`` ``[P]`` with the actions of the orders."""
    _sort_sends(g, x)
    _place_receives(g, x)
    longest = x.orders.shape[1] + 1
    sends, receives = 4 * g.virtual_microbatches, 4 * g.virtual_microbatches + 2 * g.edges * IRECV
    for rank in range(g.ranks):
        count = 0
        for i in range(x.lengths[rank]):
            at = rank * longest + i
            for j in range(x.slot[at - 1] if at > 0 else 0, x.slot[at]):
                codes[rank, count] = receives + x.by_place[j]
                count += 1
            code = x.orders[rank, i]
            for k in range(_incoming(g, code, rank, x.some)):
                if g.source[x.some[k]] != rank:
                    codes[rank, count] = 4 * g.virtual_microbatches + 2 * g.edges * WAIT_IRECV + x.some[k]
                    count += 1
            codes[rank, count] = code
            count += 1
            for k in range(_outgoing(g, code, rank, x.some)):
                if g.target[x.some[k]] != rank:
                    codes[rank, count] = sends + x.some[k]
                    count += 1
        for j in range(count):
            if sends <= codes[rank, j] < receives:
                codes[rank, count] = codes[rank, j] + 2 * g.edges * WAIT_ISEND
                count += 1
        counts[rank] = count


@compiled
def check_codes(
    g: Messages, orders: Ints, lengths: Ints, codes: Ints, counts: Ints, some: Ints, state: NDArray[np.uint8],
    fault: Ints,
) -> None:  # fmt: skip
    """Each rank's actions are its order's operations, and each has begun and awaited just the messages it must.

    ``fault`` ``[4]``: what, rank, action, message (NO_FAULT if none). ``state`` ``[2E]``, zeros.
    """
    for rank in range(g.ranks):
        at = 0
        for i in range(counts[rank]):
            code = codes[rank, i]
            if code >= 4 * g.virtual_microbatches + 8 * g.edges:
                continue  # reductions: see .reductions
            fault[1], fault[2], fault[3] = rank, i, -1
            if code < 4 * g.virtual_microbatches:
                if at >= lengths[rank] or orders[rank, at] != code:
                    fault[0] = WRONG_ORDER
                    return
                at += 1
                for k in range(_incoming(g, code, rank, some)):
                    if g.source[some[k]] != rank and not state[some[k]] & AWAITED:
                        fault[0], fault[3] = EARLY_COMPUTE, some[k]
                        return
                for k in range(_outgoing(g, code, rank, some)):
                    if g.target[some[k]] != rank:
                        state[some[k]] |= DUE
                continue
            kind = (code - 4 * g.virtual_microbatches) // (2 * g.edges)
            m = code - 4 * g.virtual_microbatches - 2 * g.edges * kind
            sending = kind in (ISEND, WAIT_ISEND)
            if (g.source[m] if sending else g.target[m]) != rank:
                fault[0] = OTHER_RANK
                return
            if kind == ISEND:
                if not state[m] & DUE or state[m] & SENT:
                    fault[0] = BAD_SEND
                    return
                state[m] |= SENT
            elif kind == IRECV:
                if state[m] & POSTED or g.source[m] == rank or not g.exists[m]:
                    fault[0] = BAD_RECEIVE
                    return
                state[m] |= POSTED
            elif kind == WAIT_IRECV:
                if not state[m] & POSTED or state[m] & AWAITED:
                    fault[0] = BAD_WAIT_RECEIVE
                    return
                state[m] |= AWAITED
            else:
                if not state[m] & SENT or state[m] & SETTLED:
                    fault[0] = BAD_WAIT_SEND
                    return
                state[m] |= SETTLED
        fault[1], fault[2], fault[3] = rank, counts[rank], -1
        if at != lengths[rank]:
            fault[0] = WRONG_ORDER
            return
    for m in range(2 * g.edges):
        fault[2], fault[3] = -1, m
        if state[m] & DUE and not state[m] & SENT:
            fault[0], fault[1] = NEVER_SENT, g.source[m]
            return
        if state[m] & POSTED and not state[m] & AWAITED:
            fault[0], fault[1] = NEVER_AWAITED, g.target[m]
            return
        if state[m] & SENT and not state[m] & SETTLED:
            fault[0], fault[1] = NEVER_SETTLED, g.source[m]
            return
    fault[0] = NO_FAULT


class Rendezvous(NamedTuple):
    """What :func:`replay_codes` works on: the messages of G replicas, as in :class:`Messages`, those of replica g from
    ``first[g]`` on; ``source`` and ``target`` are ranks.

    ``rows`` and ``edges`` ``[G]``; ``base`` ``[G + 1]``: each replica's first node. ``chunk`` ``[N]``: the number of
    the node's chunk where replicas meet, else -1. ``turn`` ``[chunks, P]``: which of all reductions a chunk's on a rank
    is. The rest is work space, zeros: ``sent`` and ``received`` ``[G * 2PP, most messages of a channel]``,
    ``sent_count`` and ``received_count`` ``[G * 2PP]``, ``matched`` (all messages).
    """

    ranks: int
    replicas: int
    rows: Ints
    edges: Ints
    first: Ints
    base: Ints
    source: Ints
    target: Ints
    chunk: Ints
    turn: Ints
    sent: Ints
    received: Ints
    sent_count: Ints
    received_count: Ints
    matched: NDArray[np.bool_]


def make_rendezvous(graphs: Sequence[OperationGraph], experts: ExpertLayers) -> Rendezvous:
    """Lay out the messages of replicas. One replica by itself has no order of reductions to keep to."""
    each, ranks = [messages_of(g) for g in graphs], graphs[0].ranks
    source, target = (np.concatenate([getattr(m, name) for m in each]) for name in ("source", "target"))
    most = 1 + max(int(np.bincount(m.source * ranks + m.target, minlength=1).max(initial=0)) for m in each)
    channels = len(graphs) * 2 * ranks**2
    turn = reduction_turns(graphs[0].modules)

    def ints(*shape: int) -> Ints:
        return np.zeros(shape, dtype=np.int32)

    return Rendezvous(
        ranks=ranks,
        replicas=len(graphs),
        rows=np.array([m.virtual_microbatches for m in each], dtype=np.int32),
        edges=np.array([m.edges for m in each], dtype=np.int32),
        first=np.cumsum([0, *(2 * m.edges for m in each)]).astype(np.int32),
        base=np.cumsum([0, *(m.virtual_microbatches * ranks for m in each)]).astype(np.int32),
        source=source,
        target=target,
        chunk=np.concatenate([experts.chunks(g).reshape(-1) for g in graphs]),
        turn=turn if len(graphs) > 1 else np.zeros_like(turn),
        sent=ints(channels, most),
        received=ints(channels, most),
        sent_count=ints(channels),
        received_count=ints(channels),
        matched=np.zeros(len(source), dtype=np.bool_),
    )


@compiled
def replay_codes(x: Rendezvous, codes: Ints, counts: Ints, place: Ints, fault: Ints) -> None:
    """Run the actions ``codes`` ``[G * P, .]`` of all replicas under rendezvous semantics: an operation that meets or a
    reduction when all replicas stand at one, and a reduction after all those that have an earlier turn.

    ``fault`` ``[4]`` as in :func:`check_codes`; ``place`` ``[G * P]``, zeros, says where each rank stands.
    """
    progressed = True
    reduced = 0
    while progressed:
        progressed = False
        for p in range(x.ranks):
            waiting, turn = 0, -1
            for g in range(x.replicas):
                line = g * x.ranks + p
                rows, edges = x.rows[g], x.edges[g]
                while place[line] < counts[line]:
                    code = codes[line, place[line]]
                    if code >= 4 * rows + 8 * edges:
                        turn = x.turn[code - 4 * rows - 8 * edges, p]
                        waiting += 1
                        break
                    if code < 4 * rows:
                        kind = code // rows
                        if kind != WEIGHT and x.chunk[x.base[g] + (code - kind * rows) * x.ranks + p] >= 0:
                            waiting += 1
                            break
                    else:
                        kind = (code - 4 * rows) // (2 * edges)
                        m = code - 4 * rows - 2 * edges * kind
                        k = x.first[g] + m
                        if kind in (ISEND, IRECV):
                            c = ((g * x.ranks + x.source[k]) * x.ranks + x.target[k]) * 2 + (1 if m >= edges else 0)
                            if kind == ISEND:
                                at = x.sent_count[c]
                                x.sent[c, at] = k
                                x.sent_count[c] += 1
                            else:
                                at = x.received_count[c]
                                x.received[c, at] = k
                                x.received_count[c] += 1
                            if at < min(x.sent_count[c], x.received_count[c]):
                                if x.sent[c, at] != x.received[c, at]:
                                    fault[0], fault[1], fault[2], fault[3] = (
                                        MISMATCH,
                                        c,
                                        x.sent[c, at],
                                        x.received[c, at],
                                    )
                                    return
                                x.matched[k] = True
                        elif not x.matched[k]:
                            break
                    place[line] += 1
                    progressed = True
            if waiting == x.replicas and turn <= reduced:
                reduced += turn >= 0
                for g in range(x.replicas):
                    place[g * x.ranks + p] += 1
                progressed = True
    fault[0] = NO_FAULT
    for line in range(len(counts)):
        if place[line] < counts[line]:
            fault[0] = DEADLOCK
            return
    for c in range(len(x.sent_count)):
        if x.sent_count[c] != x.received_count[c]:
            fault[0], fault[1], fault[2], fault[3] = UNMATCHED, c, x.sent_count[c], x.received_count[c]
            return
