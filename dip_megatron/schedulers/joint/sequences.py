"""The explicit orders of all coupled replicas, replayed after each change; :mod:`.moves` searches among them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.graph import Floats, Ints
from ...core.joint.kernels import JointArrays
from ...core.simulate.compiled import compiled
from ...core.simulate.kernels import BACKWARD, FORWARD, WEIGHT, backward_ready, forward_ready
from ..dip.random import below, uniform


class JointProblem(NamedTuple):
    """All replicas for the search; nodes and lines as in :mod:`core.joint.kernels`. ``duration`` ``[4, C, N]``,
    ``activation``, ``deferred_activation`` ``[C, N]`` by the candidates of the graph put together; ``member``
    ``[G, N']``: the node of each replica behind each of that graph's nodes (-1: none), ``place_of`` ``[N]`` the way
    back. ``static`` and ``limit`` ``[G * P]`` bytes. ``bounded``: whether a line's memory can be too small."""

    x: JointArrays
    duration: Floats
    activation: Floats
    deferred_activation: Floats
    has_backward: NDArray[np.bool_]
    has_weight: NDArray[np.bool_]
    member: Ints
    place_of: Ints
    static: Floats
    limit: Floats
    bounded: NDArray[np.bool_]


class JointSequences(NamedTuple):
    """Orders under way and the best ones, with their times; see :class:`..dip.sequences.Sequences`. ``held`` and
    ``rest`` ``[G * P]``: when a line that waits for an event could start it, and the seconds of what it still runs."""

    orders: Ints
    lengths: Ints
    strategy: NDArray[np.int8]
    best_orders: Ints
    best_lengths: Ints
    best_strategy: NDArray[np.int8]
    start: Floats
    end: Floats
    trial_start: Floats
    trial_end: Floats
    ends: Floats
    trial_ends: Floats
    at: Ints
    first: Ints
    place: Ints
    held: Floats
    rest: Floats
    arcs: Ints
    arc_count: Ints
    saved: Ints
    saved_lengths: Ints


def make_joint_sequences(q: JointProblem, orders: Ints, lengths: Ints, strategy: NDArray[np.int8]) -> JointSequences:
    """A walk that starts from ``orders`` ``[G * P, L]`` (joint codes, with room for split backwards)."""
    lines, nodes = len(lengths), q.x.nodes

    def seconds(*shape: int) -> Floats:
        return np.zeros(shape)

    def numbers(*shape: int) -> Ints:
        return np.zeros(shape, dtype=np.int32)

    return JointSequences(
        orders=orders.copy(), lengths=lengths.copy(), strategy=strategy.copy(), best_orders=orders.copy(),
        best_lengths=lengths.copy(), best_strategy=strategy.copy(), start=seconds(*orders.shape),
        end=seconds(*orders.shape), trial_start=seconds(*orders.shape), trial_end=seconds(*orders.shape),
        ends=seconds(2, nodes), trial_ends=seconds(2, nodes), at=numbers(lines), first=numbers(lines),
        place=numbers(2, nodes), held=seconds(lines), rest=seconds(lines), arcs=numbers(orders.size, 2),
        arc_count=numbers(1), saved=orders.copy(), saved_lengths=lengths.copy(),
    )  # fmt: skip


@compiled
def is_event(q: JointProblem, code: int) -> bool:
    """Whether the operation of this code runs on all replicas at once."""
    return code // q.x.nodes != WEIGHT and q.x.chunk[code % q.x.nodes] >= 0


@compiled
def line_fits(q: JointProblem, s: JointSequences, line: int) -> bool:
    """Whether a rank of a replica stays within its memory."""
    if not q.bounded[line]:
        return True
    held = q.static[line]
    for i in range(s.lengths[line]):
        kind = s.orders[line, i] // q.x.nodes
        n = s.orders[line, i] - kind * q.x.nodes
        c = s.strategy[n]
        if kind == FORWARD:
            held += q.activation[c, n]
        elif kind == WEIGHT:
            held -= q.deferred_activation[c, n]
        else:
            held -= q.activation[c, n]
            if kind == BACKWARD and q.has_weight[n]:
                held += q.deferred_activation[c, n]
        if held > q.limit[line]:
            return False
        if kind == FORWARD and not q.has_backward[n]:
            held -= q.activation[c, n]
    return True


@compiled
def replay_from(q: JointProblem, s: JointSequences, since: float, limit: float) -> float:
    """The time of orders that have changed only where operations start at ``since`` seconds or later; nan if they can't
    end, inf as soon as a rank can't end before ``limit``."""
    x = q.x
    remaining = 0
    for line in range(len(s.lengths)):
        low, high = 0, s.saved_lengths[line]
        while low < high:
            middle = (low + high) >> 1
            if s.start[line, middle] < since:
                low = middle + 1
            else:
                high = middle
        s.first[line] = low
        s.at[line] = low
        s.held[line] = -1.0
        s.rest[line] = 0.0
        if low > 0:
            s.trial_end[line, low - 1] = s.end[line, low - 1]
        for i in range(low, s.lengths[line]):
            kind = s.orders[line, i] // x.nodes
            n = s.orders[line, i] - kind * x.nodes
            s.rest[line] += q.duration[kind, s.strategy[n], n]
            if kind != WEIGHT:
                s.trial_ends[0 if kind == FORWARD else 1, n] = np.nan
        remaining += s.lengths[line] - low
    forward_end, backward_end = s.trial_ends[0], s.trial_ends[1]
    while remaining > 0:
        progressed = False
        for p in range(x.ranks):
            waiting = 0
            for g in range(x.replicas):
                line = g * x.ranks + p
                if s.held[line] >= 0.0:
                    waiting += 1
                    continue
                i = s.at[line]
                clock = s.trial_end[line, i - 1] if i > 0 else 0.0
                while i < s.lengths[line]:
                    kind = s.orders[line, i] // x.nodes
                    n = s.orders[line, i] - kind * x.nodes
                    ready = clock
                    if kind == FORWARD:
                        ready = forward_ready(x, n, forward_end, ready)
                    elif kind != WEIGHT:
                        # Its own F and, for a W, its own B come earlier in this very order.
                        ready = backward_ready(x, n, backward_end, ready)
                    if np.isnan(ready):
                        break
                    if ready + s.rest[line] > limit:
                        return np.inf
                    if kind != WEIGHT and x.chunk[n] >= 0:
                        s.held[line] = ready
                        waiting += 1
                        break
                    length = q.duration[kind, s.strategy[n], n]
                    clock = ready + length
                    s.rest[line] -= length
                    s.trial_start[line, i] = ready
                    s.trial_end[line, i] = clock
                    if kind != WEIGHT:
                        s.trial_ends[0 if kind == FORWARD else 1, n] = clock
                    i += 1
                    remaining -= 1
                    progressed = True
                s.at[line] = i
            if waiting < x.replicas:
                continue
            begin, longest = 0.0, 0.0
            for g in range(x.replicas):
                line = g * x.ranks + p
                kind = s.orders[line, s.at[line]] // x.nodes
                n = s.orders[line, s.at[line]] - kind * x.nodes
                begin = max(begin, s.held[line])
                longest = max(longest, q.duration[kind, s.strategy[n], n])
            for g in range(x.replicas):
                line = g * x.ranks + p
                i = s.at[line]
                kind = s.orders[line, i] // x.nodes
                n = s.orders[line, i] - kind * x.nodes
                s.rest[line] -= q.duration[kind, s.strategy[n], n]
                s.trial_start[line, i] = begin
                s.trial_end[line, i] = begin + longest
                s.trial_ends[0 if kind == FORWARD else 1, n] = begin + longest
                s.at[line] = i + 1
                s.held[line] = -1.0
                remaining -= 1
                if begin + longest + s.rest[line] > limit:
                    return np.inf
            progressed = True
        if not progressed:
            return np.nan
    latest = 0.0
    for line in range(len(s.lengths)):
        i = s.lengths[line] - 1
        if i >= 0:
            latest = max(latest, s.trial_end[line, i] if i >= s.first[line] else s.end[line, i])
    return latest


@compiled
def settle(q: JointProblem, s: JointSequences, accepted: bool) -> None:
    """After :func:`replay_from`: make the trial's times the current ones, or take the change back."""
    for line in range(len(s.lengths)):
        if not accepted:
            s.lengths[line] = s.saved_lengths[line]
        for i in range(s.first[line], s.lengths[line]):
            if accepted:
                s.start[line, i] = s.trial_start[line, i]
                s.end[line, i] = s.trial_end[line, i]
                s.saved[line, i] = s.orders[line, i]
            else:
                s.orders[line, i] = s.saved[line, i]
            kind = s.orders[line, i] // q.x.nodes
            if kind != WEIGHT:
                k, n = 0 if kind == FORWARD else 1, s.orders[line, i] - kind * q.x.nodes
                if accepted:
                    s.ends[k, n] = s.trial_ends[k, n]
                    s.place[k, n] = i
                else:
                    s.trial_ends[k, n] = s.ends[k, n]
        if accepted:
            s.saved_lengths[line] = s.lengths[line]


@compiled
def restore(s: JointSequences, line: int) -> None:
    """Take back a change of one line that was not tried."""
    s.lengths[line] = s.saved_lengths[line]
    for i in range(s.lengths[line]):
        s.orders[line, i] = s.saved[line, i]


@compiled
def begin_joint(q: JointProblem, s: JointSequences, random: NDArray[np.uint64]) -> float:
    """Time the orders to start from."""
    time = replay_from(q, s, -1.0, np.inf)
    settle(q, s, True)
    trace_joint(q, s, random)
    return time


@compiled
def _waited_for(q: JointProblem, s: JointSequences, line: int, i: int, begin: float, out: Ints) -> int:
    """Into ``out``: the line and place of an operation on another rank at whose output operation (line, i) began. Bit 0
    of the result: there is one; bit 1: the operation before it in its own line ended then."""
    x = q.x
    kind = s.orders[line, i] // x.nodes
    n = s.orders[line, i] - kind * x.nodes
    replica = line - line % x.ranks
    found = 0
    if kind == FORWARD:
        for e in range(x.before_start[n], x.before_start[n + 1]):
            m = x.before[e]
            if s.ends[0, m] + x.before_transfer[e] == begin:
                out[0] = replica + (m - x.base[line // x.ranks]) % x.ranks
                out[1] = s.place[0, m]
                found = 1
    elif kind != WEIGHT:
        for e in range(x.after_start[n], x.after_start[n + 1]):
            m = x.after[e]
            if s.ends[1, m] + x.after_transfer[e] == begin:
                out[0] = replica + (m - x.base[line // x.ranks]) % x.ranks
                out[1] = s.place[1, m]
                found = 1
    if i > 0 and s.end[line, i - 1] == begin:
        found |= 2
    return found


@compiled
def trace_joint(q: JointProblem, s: JointSequences, random: NDArray[np.uint64]) -> None:
    """Follow one longest path from the end to the start, branching at random; an event goes on where a member came
    last. Fills ``arcs``: (line, place) of operations that wait for the one before them."""
    x = q.x
    line, latest = 0, -1.0
    for n in range(len(s.lengths)):
        if s.lengths[n] > 0 and s.end[n, s.lengths[n] - 1] > latest:
            latest = s.end[n, s.lengths[n] - 1]
            line = n
    i = s.lengths[line] - 1
    count = 0
    out = s.arcs[len(s.arcs) - 1]
    while i >= 0 and count < len(s.arcs) - 1:
        begin = s.start[line, i]
        if begin <= 0.0:
            break
        found = _waited_for(q, s, line, i, begin, out)
        if is_event(q, s.orders[line, i]):
            # Another member may have been the last to come.
            node = q.place_of[s.orders[line, i] % x.nodes]
            turn = below(random, x.replicas)
            k = 0 if s.orders[line, i] // x.nodes == FORWARD else 1
            for g in range(x.replicas):
                h = (g + turn) % x.replicas
                other = h * x.ranks + line % x.ranks
                place = s.place[k, q.member[h, node]]
                found = _waited_for(q, s, other, place, begin, out)
                if found:
                    line, i = other, place
                    break
        if found & 2 and (not found & 1 or uniform(random) < 0.5):
            s.arcs[count, 0] = line
            s.arcs[count, 1] = i
            count += 1
            i -= 1
        elif found & 1:
            line, i = out[0], out[1]
        else:
            break
    s.arc_count[0] = count
