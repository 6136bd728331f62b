"""The explicit orders of all coupled replicas, what they hold, and what is on their longest path. :mod:`.times` times
them again after a change, :mod:`.moves` searches among them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.graph import Floats, Ints
from ...core.simulate.compiled import compiled
from ...core.simulate.kernels import BACKWARD, FORWARD, FUSED, WEIGHT, GraphArrays
from ..dip.random import below, uniform


class JointProblem(NamedTuple):
    """All replicas for the search; nodes and lines as in :class:`core.simulate.GraphArrays`.

    ``duration`` ``[4, C, N]``, ``activation``, ``deferred_activation`` ``[C, N]`` by the candidates of the graph put
    together; ``member`` ``[G, N']``: the node of each replica behind each of that graph's nodes (-1: none),
    ``place_of`` ``[N]`` the way back, ``line`` ``[N]``. ``static`` and ``limit`` ``[G * P]`` bytes. ``bounded``:
    whether a line's memory can be too small.
    """

    x: GraphArrays
    duration: Floats
    activation: Floats
    deferred_activation: Floats
    has_backward: NDArray[np.bool_]
    has_weight: NDArray[np.bool_]
    member: Ints
    place_of: Ints
    line: Ints
    static: Floats
    limit: Floats
    bounded: NDArray[np.bool_]


class JointSequences(NamedTuple):
    """Orders under way and the best ones, with their times; see :class:`..dip.sequences.Sequences`.

    *Numbers* of operations are ``k * N + node``, k = 0 for a forward, 1 for a backward (B or BW), 2 for a W.
    ``start``, ``end`` and ``tail`` ``[3N]`` by number: the tail is the longest path from the start of an operation to
    the end of all. ``place`` ``[3N]``: where it stands in its line. ``heap`` and ``key``: numbers to be timed again,
    by time; ``is_waiting`` those in it. ``touched``: numbers whose times have changed since the trial began,
    ``is_touched`` them, ``visits`` how often, ``before_start`` and ``before_end`` the times before. ``changed``
    ``[G, 4]``: lines that the trial changed, their first and last places and the last one whose neighbour is another;
    ``saved`` what stood there. ``nodes``: stages whose strategy it changed, ``old_strategy`` from which. ``arcs``:
    (line, place) on the longest path that wait for the operation before them. ``counts``: how many there are of each
    (:data:`HEAP` and so on). ``less`` ``[2]``: tails of what started after the first of these seconds can be as much
    less as the second says."""

    orders: Ints
    lengths: Ints
    strategy: NDArray[np.int8]
    best_orders: Ints
    best_lengths: Ints
    best_strategy: NDArray[np.int8]
    start: Floats
    end: Floats
    tail: Floats
    place: Ints
    key: Floats
    heap: Ints
    is_waiting: NDArray[np.bool_]
    touched: Ints
    visits: Ints
    is_touched: NDArray[np.bool_]
    before_start: Floats
    before_end: Floats
    saved: Ints
    saved_lengths: Ints
    changed: Ints
    nodes: Ints
    old_strategy: NDArray[np.int8]
    arcs: Ints
    counts: Ints
    less: Floats


HEAP, TOUCHED, CHANGED, ARCS, NODES = 0, 1, 2, 3, 4


def make_joint_sequences(q: JointProblem, orders: Ints, lengths: Ints, strategy: NDArray[np.int8]) -> JointSequences:
    """A walk that starts from ``orders`` ``[G * P, L]`` (joint codes, with room for split backwards)."""
    numbers = 3 * q.x.nodes

    def seconds() -> Floats:
        return np.zeros(numbers)

    def whole(*shape: int) -> Ints:
        return np.zeros(shape, dtype=np.int32)

    def flags() -> NDArray[np.bool_]:
        return np.zeros(numbers, dtype=np.bool_)

    return JointSequences(
        orders=orders.copy(), lengths=lengths.copy(), strategy=strategy.copy(), best_orders=orders.copy(),
        best_lengths=lengths.copy(), best_strategy=strategy.copy(), start=seconds(), end=seconds(), tail=seconds(),
        place=whole(numbers), key=seconds(), heap=whole(numbers), is_waiting=flags(), touched=whole(numbers),
        visits=whole(numbers), is_touched=flags(), before_start=seconds(), before_end=seconds(), saved=orders.copy(),
        saved_lengths=lengths.copy(), changed=whole(q.x.replicas, 4), nodes=whole(numbers),
        old_strategy=strategy.copy(), arcs=whole(orders.size, 2), counts=whole(5),
        less=np.zeros(2),
    )  # fmt: skip


@compiled
def is_event(q: JointProblem, code: int) -> bool:
    """Whether the operation of this code runs on all replicas at once."""
    return code // q.x.nodes != WEIGHT and q.x.chunk[code % q.x.nodes] >= 0


@compiled
def number_of(q: JointProblem, code: int) -> int:
    """The number of the operation with this code: a backward has one, fused or not."""
    return code - 2 * q.x.nodes if code // q.x.nodes == FUSED else code


@compiled
def first_over(q: JointProblem, s: JointSequences, line: int) -> int:
    """The first place at which a rank of a replica holds more than it may; -1 if there is none."""
    if not q.bounded[line]:
        return -1
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
            return i
        if kind == FORWARD and not q.has_backward[n]:
            held -= q.activation[c, n]
    return -1


@compiled
def _waited_for(q: JointProblem, s: JointSequences, number: int, begin: float) -> int:
    """The number of an operation on another rank at whose output this one began; -1 if there is none."""
    x = q.x
    kind = number // x.nodes
    n = number - kind * x.nodes
    found = -1
    if kind == FORWARD:
        for e in range(x.before_start[n], x.before_start[n + 1]):
            if s.end[x.before[e]] + x.before_transfer[e] == begin:
                found = x.before[e]
    elif kind != WEIGHT:
        for e in range(x.after_start[n], x.after_start[n + 1]):
            if s.end[x.nodes + x.after[e]] + x.after_transfer[e] == begin:
                found = x.nodes + x.after[e]
    return found


@compiled
def trace_joint(q: JointProblem, s: JointSequences, random: NDArray[np.uint64]) -> None:
    """Follow one longest path from the end to the start, branching at random; an event goes on where a member came
    last. Fills ``arcs``."""
    x = q.x
    line, latest = 0, -1.0
    for n in range(len(s.lengths)):
        if s.lengths[n] > 0:
            end = s.end[number_of(q, s.orders[n, s.lengths[n] - 1])]
            if end > latest:
                latest, line = end, n
    i = s.lengths[line] - 1
    count = 0
    while i >= 0 and count < len(s.arcs):
        code = s.orders[line, i]
        number = number_of(q, code)
        begin = s.start[number]
        if begin <= 0.0:
            break
        other = _waited_for(q, s, number, begin)
        after = i > 0 and s.end[number_of(q, s.orders[line, i - 1])] == begin
        if is_event(q, code):
            # Another member may have been the last to come.
            node, turn = q.place_of[number % x.nodes], below(random, x.replicas)
            for g in range(x.replicas):
                m = q.member[(g + turn) % x.replicas, node]
                number = number - number % x.nodes + m
                place, mine = s.place[number], q.line[m]
                other = _waited_for(q, s, number, begin)
                after = place > 0 and s.end[number_of(q, s.orders[mine, place - 1])] == begin
                if other >= 0 or after:
                    line, i = mine, place
                    break
        if after and (other < 0 or uniform(random) < 0.5):
            s.arcs[count, 0] = line
            s.arcs[count, 1] = i
            count += 1
            i -= 1
        elif other >= 0:
            line, i = q.line[other % x.nodes], s.place[other]
        else:
            break
    s.counts[ARCS] = count


@compiled
def line_fits(q: JointProblem, s: JointSequences, line: int) -> bool:
    """Whether a rank of a replica stays within its memory."""
    return first_over(q, s, line) < 0
