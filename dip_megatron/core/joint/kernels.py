"""Compiled loops over the operations and actions of all coupled replicas.

Replicas stand one after the other: *line* ``g * P + p`` is rank p of replica g, *node* ``base[g] + s * P + p`` its
stage of virtual microbatch s. Codes of operations are ``kind * N + node`` with N nodes in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..experts import ExpertLayers
from ..graph import Floats, Ints, OperationGraph
from ..order import Schedule
from ..reductions import chunk_numbers
from ..simulate.compiled import compiled
from ..simulate.kernels import FORWARD, WEIGHT, backward_ready, forward_ready

DISAGREE = -1.0
"""Results of :func:`replay_joint` from here down are no times: -1 - p, members disagree on rank p."""


class JointArrays(NamedTuple):
    """The graphs of coupled replicas for kernels, one memory strategy a stage.

    ``duration`` ``[4 kinds, N]`` seconds. Edges into node n are ``before[before_start[n]:before_start[n + 1]]`` as in
    :class:`..simulate.kernels.GraphArrays`, those out of it ``after``. ``chunk`` ``[N]`` is the number of the stage's
    (module, segment) where it has experts, -1 elsewhere.
    """

    nodes: int
    ranks: int
    replicas: int
    base: Ints
    duration: Floats
    before_start: Ints
    before: Ints
    before_transfer: Floats
    after_start: Ints
    after: Ints
    after_transfer: Floats
    chunk: Ints


def joint_arrays(
    graphs: Sequence[OperationGraph], strategies: Sequence[NDArray[np.int8]], experts: ExpertLayers
) -> JointArrays:
    """Lay out ``graphs`` with ``strategies[g]`` ``[S, P]``."""
    ranks = graphs[0].ranks
    base = np.cumsum([0, *(g.virtual_microbatches * ranks for g in graphs)]).astype(np.int32)
    durations, chunks = [], []
    parts: dict[str, list[NDArray[np.generic]]] = {name: [] for name in JointArrays._fields}
    edges = 0
    for g, (graph, strategy) in enumerate(zip(graphs, strategies, strict=True)):
        index = strategy[None].astype(np.int64)
        durations.append(
            np.stack([
                np.take_along_axis(a, index, axis=0)[0].reshape(-1)
                for a in (graph.forward, graph.backward, graph.weight, graph.fused)
            ])
        )  # fmt: skip
        e = graph.edges
        parts["before_start"].append(e.before_start[:-1] + edges)
        parts["after_start"].append(e.after_start[:-1] + edges)
        parts["before"].append(e.source + base[g])
        parts["before_transfer"].append(e.transfer)
        parts["after"].append(e.target[e.after] + base[g])
        parts["after_transfer"].append(e.transfer[e.after])
        edges += len(e.source)
        chunks.append(np.where(experts.meets(graph), chunk_numbers(graph)[:, None], -1).reshape(-1))

    def ints(name: str, *end: int) -> Ints:
        return np.concatenate([*parts[name], np.array(end, dtype=np.int64)]).astype(np.int32)

    return JointArrays(
        nodes=int(base[-1]),
        ranks=ranks,
        replicas=len(graphs),
        base=base,
        duration=np.ascontiguousarray(np.concatenate(durations, axis=1), dtype=np.float64),
        before_start=ints("before_start", edges),
        before=ints("before"),
        before_transfer=np.concatenate(parts["before_transfer"]).astype(np.float64),
        after_start=ints("after_start", edges),
        after=ints("after"),
        after_transfer=np.concatenate(parts["after_transfer"]).astype(np.float64),
        chunk=np.concatenate(chunks).astype(np.int32),
    )


def pad_joint_orders(x: JointArrays, schedules: Sequence[Schedule]) -> tuple[Ints, Ints]:
    """The orders of all replicas' ranks as one array ``[G * P, longest]`` of joint codes, and their lengths."""
    lengths = np.array([len(order) for s in schedules for order in s.orders], dtype=np.int32)
    out = np.zeros((len(lengths), max(1, int(lengths.max(initial=0)))), dtype=np.int32)
    for g, schedule in enumerate(schedules):
        rows = int(x.base[g + 1] - x.base[g]) // x.ranks
        for p, order in enumerate(schedule.orders):
            kind, row = np.divmod(order, rows)
            out[g * x.ranks + p, : len(order)] = kind * x.nodes + x.base[g] + row * x.ranks + p
    return out, lengths


@compiled
def input_time(x: JointArrays, kind: int, n: int, forward_end: Floats, backward_end: Floats, clock: float) -> float:
    """When an operation could start on a rank that is free at ``clock``; nan if that is not known yet."""
    ready = clock
    if kind == FORWARD:
        ready = forward_ready(x, n, forward_end, ready)
    elif kind == WEIGHT:
        if not backward_end[n] <= ready:
            ready = backward_end[n]
    else:
        if not forward_end[n] <= ready:
            ready = forward_end[n]
        if not np.isnan(ready):
            ready = backward_ready(x, n, backward_end, ready)
    return ready


@compiled
def replay_joint(
    x: JointArrays, orders: Ints, lengths: Ints, start: Floats, end: Floats, place: Ints, held: Floats,
    forward_end: Floats, backward_end: Floats,
) -> float:  # fmt: skip
    """:func:`..simulate.kernels.replay` with events. Returns the time, nan at a deadlock, or :data:`DISAGREE` - p.

    ``start``, ``end`` ``[G * P, L]``, ``place`` ``[G * P]``, ``forward_end``, ``backward_end`` ``[N]`` are overwritten;
    ``held`` ``[G * P]``: when a line that waits for an event could start it.
    """
    forward_end[:] = np.nan
    backward_end[:] = np.nan
    place[:] = 0
    held[:] = -1.0
    remaining = 0
    for line in range(len(lengths)):
        remaining += lengths[line]
    latest = 0.0
    while remaining > 0:
        progressed = False
        for p in range(x.ranks):
            waiting = 0
            for g in range(x.replicas):
                line = g * x.ranks + p
                if held[line] >= 0.0:
                    waiting += 1
                    continue
                i = place[line]
                clock = end[line, i - 1] if i > 0 else 0.0
                while i < lengths[line]:
                    kind = orders[line, i] // x.nodes
                    n = orders[line, i] - kind * x.nodes
                    ready = input_time(x, kind, n, forward_end, backward_end, clock)
                    if np.isnan(ready):
                        break
                    if x.chunk[n] >= 0 and kind != WEIGHT:
                        held[line] = ready
                        waiting += 1
                        break
                    clock = ready + x.duration[kind, n]
                    start[line, i] = ready
                    end[line, i] = clock
                    if kind == FORWARD:
                        forward_end[n] = clock
                    elif kind != WEIGHT:
                        backward_end[n] = clock
                    i += 1
                    remaining -= 1
                    progressed = True
                place[line] = i
                latest = max(latest, clock)
            if waiting < x.replicas:
                continue
            begin, length = 0.0, 0.0
            for g in range(x.replicas):
                line = g * x.ranks + p
                kind = orders[line, place[line]] // x.nodes
                n = orders[line, place[line]] - kind * x.nodes
                begin = max(begin, held[line])
                length = max(length, x.duration[kind, n])
            first = orders[p, place[p]]
            for g in range(x.replicas):
                code = orders[g * x.ranks + p, place[g * x.ranks + p]]
                same_chunk = x.chunk[code % x.nodes] == x.chunk[first % x.nodes]
                if not same_chunk or (code // x.nodes == FORWARD) != (first // x.nodes == FORWARD):
                    return DISAGREE - p
            for g in range(x.replicas):
                line = g * x.ranks + p
                i = place[line]
                kind = orders[line, i] // x.nodes
                n = orders[line, i] - kind * x.nodes
                start[line, i] = begin
                end[line, i] = begin + length
                if kind == FORWARD:
                    forward_end[n] = begin + length
                else:
                    backward_end[n] = begin + length
                place[line] = i + 1
                held[line] = -1.0
                remaining -= 1
            latest = max(latest, begin + length)
            progressed = True
        if not progressed:
            return np.nan
    return latest


class JointMessages(NamedTuple):
    """The messages of all replicas' graphs, as in :class:`..kernels.Messages`, for replica g from ``first[g]`` on;
    ``source`` and ``target`` are ranks. ``rows`` and ``edges`` ``[G]``; ``node`` ``[G]``: its first node. ``turn``
    ``[chunks, P]``: which of all reductions a chunk's on a rank is."""

    ranks: int
    replicas: int
    rows: Ints
    edges: Ints
    first: Ints
    node: Ints
    source: Ints
    target: Ints
    turn: Ints


@compiled
def replay_actions(
    m: JointMessages, chunk: Ints, codes: Ints, counts: Ints, place: Ints, sent: Ints, received: Ints,
    sent_count: Ints, received_count: Ints, matched: NDArray[np.bool_],
) -> bool:  # fmt: skip
    """Run the actions ``codes`` ``[G * P, .]`` of all replicas together under rendezvous semantics, an operation with
    experts or a reduction when all members stand at one, and a reduction after all those that have an earlier turn;
    True if all end. ``place`` ``[G * P]`` tells where each rank stands.

    The order of events, reductions and messages must have been checked before. Work space: ``sent``, ``received``
    ``[G * 2PP, most messages of a channel]``, ``sent_count``, ``received_count`` ``[G * 2PP]``, ``matched`` (all
    messages), zeros.
    """
    progressed = True
    reduced = 0
    while progressed:
        progressed = False
        for p in range(m.ranks):
            waiting, turn = 0, -1
            for g in range(m.replicas):
                line = g * m.ranks + p
                rows, edges = m.rows[g], m.edges[g]
                while place[line] < counts[line]:
                    code = codes[line, place[line]]
                    if code >= 4 * rows + 8 * edges:
                        turn = m.turn[code - 4 * rows - 8 * edges, p]
                        waiting += 1
                        break
                    if code < 4 * rows:
                        kind = code // rows
                        if kind != WEIGHT and chunk[m.node[g] + (code - kind * rows) * m.ranks + p] >= 0:
                            waiting += 1
                            break
                    else:
                        kind = (code - 4 * rows) // (2 * edges)
                        message = code - 4 * rows - 2 * edges * kind
                        k = m.first[g] + message
                        if kind >= 2:
                            if not matched[k]:
                                break
                        else:
                            c = ((g * m.ranks + m.source[k]) * m.ranks + m.target[k]) * 2 + (message >= edges)
                            if kind == 0:
                                at = sent_count[c]
                                sent[c, at] = k
                                sent_count[c] += 1
                            else:
                                at = received_count[c]
                                received[c, at] = k
                                received_count[c] += 1
                            if at < min(sent_count[c], received_count[c]):
                                matched[sent[c, at]] = True
                    place[line] += 1
                    progressed = True
            if waiting == m.replicas and turn <= reduced:
                reduced += turn >= 0
                for g in range(m.replicas):
                    place[g * m.ranks + p] += 1
                progressed = True
    for line in range(len(counts)):  # noqa: SIM110 (all() would allocate)
        if place[line] < counts[line]:
            return False
    return True
