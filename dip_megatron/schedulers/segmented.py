"""A static order over modality-segmented chunks: what the partitioner gives before any search."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.graph import StageGraph
from ..core.operations import Kind
from ..core.order import Schedule
from .common import code, fused_backward, uniform
from .megatron import legal_group

_FORWARD, _BACKWARD = int(Kind.F), int(Kind.BW)


def segmented_static(graph: StageGraph) -> Schedule:
    """Megatron's interleaved order, carried over to modality-segmented chunks (the paper's "+ partitioner" step).

    Groups of microbatches as Megatron makes them; within a group chunk after chunk of the model, each for all its
    sub-microbatches in natural order; backwards mirrored. Warm-up: all chunks but the last for the first group, plus
    two forwards for each rank that follows. A batch with too few sub-microbatches to fill this pattern would hang; then
    a rank that everyone waits for runs one more forward before its next backward.
    """
    forwards, backwards = _static_tables(graph)
    last_chunk = len(_chunks(graph)) - 1
    first_last = next(i for i, (chunk, _) in enumerate(forwards) if chunk == last_chunk)
    forward_order = [virtual_microbatch for _, virtual_microbatch in forwards]
    backward_order = [virtual_microbatch for _, virtual_microbatch in backwards]
    warmups = [min(first_last + 2 * (graph.ranks - rank - 1), len(forward_order)) for rank in range(graph.ranks)]
    return uniform(graph, _replay(graph, forward_order, backward_order, warmups))


def _chunks(graph: StageGraph) -> list[tuple[str, int]]:
    """(module, segment) in model order, those modules only that have units."""
    present = {u.module for u in graph.units}
    return [(m.name, k) for m in graph.modules if m.name in present for k in range(m.segments)]


def _static_tables(graph: StageGraph) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(chunk, virtual microbatch) in forward and in backward order."""
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
    graph: StageGraph, forwards: Sequence[int], backwards: Sequence[int], warmups: Sequence[int]
) -> list[list[int]]:
    """Warm-up, then forward and backward in turns, waiting for inputs; where all wait, one more forward goes first."""
    ranks = graph.ranks
    done: set[tuple[int, int, int]] = set()
    orders: list[list[int]] = [[] for _ in range(ranks)]
    nf, nb = [0] * ranks, [0] * ranks
    extra = [0] * ranks

    def ready_forward(rank: int) -> bool:
        return nf[rank] < len(forwards) and _inputs_done(graph, done, _FORWARD, forwards[nf[rank]], rank)

    def ready_backward(rank: int) -> bool:
        return nb[rank] < len(backwards) and _inputs_done(graph, done, _BACKWARD, backwards[nb[rank]], rank)

    def run_forward(rank: int) -> None:
        done.add((_FORWARD, forwards[nf[rank]], rank))
        orders[rank].append(code(graph, Kind.F, forwards[nf[rank]]))
        nf[rank] += 1

    remaining = 2 * len(forwards) * ranks
    while remaining:
        progressed = False
        for rank in range(ranks):
            while True:
                forward_turn = nf[rank] < len(forwards) and nf[rank] - nb[rank] <= warmups[rank] + extra[rank]
                if forward_turn and ready_forward(rank):
                    run_forward(rank)
                elif not forward_turn and ready_backward(rank):
                    virtual_microbatch = backwards[nb[rank]]
                    done.add((_BACKWARD, virtual_microbatch, rank))
                    orders[rank] += fused_backward(graph, virtual_microbatch, rank)
                    nb[rank] += 1
                else:
                    break
                remaining -= 1
                progressed = True
        if not progressed:
            # Forwards follow one topological order on all ranks, so one of them can always run.
            rank = next(r for r in range(ranks) if ready_forward(r) or ready_backward(r))
            if ready_forward(rank):
                extra[rank] += 1
            else:
                extra[rank] -= 1
    return orders


def _inputs_done(
    graph: StageGraph, done: set[tuple[int, int, int]], kind: int, virtual_microbatch: int, rank: int
) -> bool:
    return all(
        (_FORWARD if d.kind == Kind.F else _BACKWARD, d.virtual_microbatch, d.rank) in done
        for d in graph.inputs(Kind(kind), virtual_microbatch, rank)
    )
