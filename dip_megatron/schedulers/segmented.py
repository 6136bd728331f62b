"""A static order over modality-segmented chunks: what the partitioner gives before any search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..core.graph import Ints, OperationGraph
from ..core.order import Schedule
from ..core.simulate.compiled import compiled
from ..core.simulate.kernels import BACKWARD, FORWARD, FUSED
from .common import uniform
from .megatron import legal_group


def segmented_static(graph: OperationGraph) -> Schedule:
    """Megatron's interleaved order, carried over to modality-segmented chunks (the paper's "+ partitioner" step).

    Groups of microbatches as Megatron makes them; within a group chunk after chunk of the model, each for all its
    sub-microbatches in natural order; backwards mirrored. Warm-up: all chunks but the last for the first group, plus
    two forwards for each rank that follows. A batch with too few sub-microbatches to fill this pattern would hang; then
    a rank that everyone waits for runs one more forward before its next backward.
    """
    forwards, backwards = _static_tables(graph)
    last_chunk = len(_chunks(graph)) - 1
    first_last = next(i for i, (chunk, _) in enumerate(forwards) if chunk == last_chunk)
    rows_forward = [virtual_microbatch for _, virtual_microbatch in forwards]
    rows_backward = [virtual_microbatch for _, virtual_microbatch in backwards]
    warmups = [min(first_last + 2 * (graph.ranks - rank - 1), len(rows_forward)) for rank in range(graph.ranks)]
    return uniform(graph, _replay(graph, rows_forward, rows_backward, warmups))


def _chunks(graph: OperationGraph) -> list[tuple[str, int]]:
    """(module, segment) in model order, those modules only that have units."""
    present = {u.module for u in graph.units}
    return [(m.name, k) for m in graph.modules if m.name in present for k in range(m.segments)]


def _static_tables(graph: OperationGraph) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(chunk, virtual_microbatch) in forward and in backward order."""
    microbatches = sorted({u.microbatch for u in graph.units})
    size = legal_group(len(microbatches), graph.ranks) if len(microbatches) >= graph.ranks else len(microbatches)
    forwards: list[tuple[int, int]] = []
    backwards: list[tuple[int, int]] = []
    chunks = list(enumerate(_chunks(graph)))
    for first in range(0, len(microbatches), size):
        group = set(microbatches[first : first + size])
        units = sorted((u for u in graph.units if u.microbatch in group), key=lambda u: (u.microbatch, u.id))
        for table, order in ((forwards, chunks), (backwards, chunks[::-1])):
            table.extend(
                (c, graph.virtual_microbatch(u.id, k)) for c, (name, k) in order for u in units if u.module == name
            )
    return forwards, backwards


def _replay(
    graph: OperationGraph, forwards: Sequence[int], backwards: Sequence[int], warmups: Sequence[int]
) -> list[list[int]]:
    """Warm-up, then forward and backward in turns, waiting for inputs; where all wait, one more forward goes first."""
    edges, count = graph.edges, len(forwards)
    orders = np.zeros((graph.ranks, 2 * count), dtype=np.int32)
    lengths = np.zeros(graph.ranks, dtype=np.int32)
    ended = _run_in_turns(
        edges.before_start, edges.source, edges.after_start, edges.target[edges.after], graph.has_backward,
        graph.has_weight, np.array(forwards, dtype=np.int32), np.array(backwards, dtype=np.int32),
        np.array(warmups, dtype=np.int32), np.zeros((2, graph.has_backward.size), dtype=np.bool_),
        np.zeros((2, graph.ranks), dtype=np.int32), orders, lengths,
    )  # fmt: skip
    if not ended:
        raise RuntimeError("no operation may run: the static order has locked up, which it must not")
    return [orders[rank, :length].tolist() for rank, length in enumerate(lengths.tolist())]


@compiled
def _ready(start: Ints, inputs: Ints, done: NDArray[np.bool_], node: int) -> bool:
    """Whether all that a node waits for is done."""
    ready = True
    for e in range(start[node], start[node + 1]):
        ready = ready and done[inputs[e]]
    return bool(ready)


@compiled
def _run_in_turns(
    before_start: Ints, before: Ints, after_start: Ints, after: Ints, has_backward: NDArray[np.bool_],
    has_weight: NDArray[np.bool_], forwards: Ints, backwards: Ints, warmups: Ints, done: NDArray[np.bool_],
    place: Ints, orders: Ints, lengths: Ints,
) -> bool:  # fmt: skip
    """``orders`` ``[P, 2S]`` of operation codes and their ``lengths`` ``[P]``; False if nothing can go on. ``done``
    ``[2, N]`` forwards and backwards and ``place`` ``[2, P]`` are buffers of zeros; ``warmups`` is used up."""
    virtual_microbatches, ranks = has_backward.shape
    count = len(forwards)
    remaining = 2 * count * ranks
    while remaining > 0:
        progressed = False
        for p in range(ranks):
            while True:
                turn = place[0, p] < count and place[0, p] - place[1, p] <= warmups[p]
                if turn:
                    virtual_microbatch = forwards[place[0, p]]
                    if not _ready(before_start, before, done[0], virtual_microbatch * ranks + p):
                        break
                    done[0, virtual_microbatch * ranks + p] = True
                    orders[p, lengths[p]] = FORWARD * virtual_microbatches + virtual_microbatch
                    lengths[p] += 1
                    place[0, p] += 1
                else:
                    if place[1, p] == count:
                        break
                    virtual_microbatch = backwards[place[1, p]]
                    n = virtual_microbatch * ranks + p
                    if not done[0, n] or not _ready(after_start, after, done[1], n):
                        break
                    done[1, n] = True
                    if has_backward[virtual_microbatch, p]:
                        kind = FUSED if has_weight[virtual_microbatch, p] else BACKWARD
                        orders[p, lengths[p]] = kind * virtual_microbatches + virtual_microbatch
                        lengths[p] += 1
                    place[1, p] += 1
                remaining -= 1
                progressed = True
        if not progressed:
            # Forwards follow one topological order on all ranks, so one of them can always run.
            more = 0
            for p in range(ranks):
                if place[0, p] < count and _ready(before_start, before, done[0], forwards[place[0, p]] * ranks + p):
                    more = 1
                elif place[1, p] < count:
                    n = backwards[place[1, p]] * ranks + p
                    if done[0, n] and _ready(after_start, after, done[1], n):
                        more = -1
                if more != 0:
                    warmups[p] += more
                    break
            if more == 0:
                return False
    return True
