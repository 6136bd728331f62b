"""Where coupled replicas start to reduce their gradients: at places of their plans, so that no collective ever waits
for one that waits for it.

Devices run the collectives of all process groups in the order in which a rank has begun them. A rank that begins an
exchange of tokens before a reduction and one that begins it after may wait for each other for ever. So coupled replicas
don't begin a reduction whenever a backward has ended: their plans say where, and it is as if they met there.

All reductions of a model, one a chunk and rank, have *one order*, that in which backwards naturally end, which depends
on nothing but how the model is cut. A set of joint plans may run if it ends although each reduction keeps a rank from
all that follows until every replica has come to it, and although none begins before all earlier ones of the order, on
whatever rank these are (:mod:`.verify`). Then any number of such sets, of groups of replicas that plan apart but
reduce gradients together, end together. They share nothing but reductions. In a ring of things that wait for one
another, a stretch from one reduction to the next lies within one set, which, with the order kept, leads from earlier
reductions to later ones alone; so no ring comes back to where it began.

Where to place them: a set's simulated times order all that it does. A reduction has the time at which the last replica
has the last gradient of its chunk on its rank, or that of the reduction before it, if that is later. Every rank that
takes part begins it before the first operation that ends after that time. What ends by then never waits for what ends
later, so that what stands before a reduction never waits for what stands behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .codes import Decoder, first_reduction
from .experts import chunk_numbers
from .graph import Floats, Ints, OperationGraph
from .modules import ModalityModule, chunks_of
from .operations import Kind
from .order import Schedule
from .plan import Plan


def reduction_order(modules: Sequence[ModalityModule]) -> tuple[tuple[int, int], ...]:
    """The one order of all reductions: (number of the chunk, rank), the last chunk first, each from the rank that has
    its last stage to the one that has its first."""
    known = {m.name: m for m in modules}
    order = []
    for number, (name, segment) in reversed(list(enumerate(chunks_of(modules)))):
        ranks = range(len(known[name].layers[segment]))
        order += [(number, r) for r in (ranks if known[name].runs_back(segment) else reversed(ranks))]
    return tuple(order)


def reduction_turns(modules: Sequence[ModalityModule]) -> Ints:
    """``[chunks, ranks]``: at which place of :func:`reduction_order` each is."""
    order = reduction_order(modules)
    out = np.zeros((len(chunks_of(modules)), len(modules[0].layers[0])), dtype=np.int32)
    for turn, place in enumerate(order):
        out[place] = turn
    return out


def _gradients(graph: OperationGraph, order: Ints, rank: int) -> tuple[NDArray[np.intp], Ints]:
    """Which operations of a rank's order leave weight gradients, and of which chunks."""
    kind, row = np.divmod(order, graph.virtual_microbatches)
    places = np.flatnonzero(((kind == int(Kind.W)) | (kind == int(Kind.BW))) & graph.has_weight[row, rank])
    return places, chunk_numbers(graph)[row[places]]


def place_reductions(
    graphs: Sequence[OperationGraph], schedules: Sequence[Schedule], ends: Sequence[Sequence[Floats]]
) -> list[list[Ints]]:
    """``[replica][rank]``: for each reduction of the rank, in order, how many of its operations come before it.
    ``ends[replica][rank]``: when each operation ends, all replicas simulated together. Empty where nothing trains."""
    modules = graphs[0].modules
    last = np.zeros((len(chunks_of(modules)), graphs[0].ranks))
    found = False
    for graph, schedule, lines in zip(graphs, schedules, ends, strict=True):
        for rank, (operations, end) in enumerate(zip(schedule.orders, lines, strict=True)):
            places, chunks = _gradients(graph, operations, rank)
            np.maximum.at(last[:, rank], chunks, end[places])
            found = found or len(places) > 0
    if not found:
        return [[np.zeros(0, dtype=np.int32) for _ in lines] for lines in ends]
    order = reduction_order(modules)
    times = np.maximum.accumulate([last[place] for place in order])
    own = [[t for t, (_, rank) in zip(times, order, strict=True) if rank == r] for r in range(graphs[0].ranks)]
    return [
        [np.searchsorted(end, own[r], side="right").astype(np.int32) for r, end in enumerate(lines)] for lines in ends
    ]


def with_reductions(graph: OperationGraph, codes: Sequence[Ints], places: Sequence[Ints]) -> tuple[Ints, ...]:
    """Lowered ``codes[rank]`` with the reductions at their ``places[rank]``: behind what the operation before sends,
    ahead of what the one after waits for."""
    sends, receives = 4 * graph.virtual_microbatches, 4 * graph.virtual_microbatches + 2 * len(graph.edges.source)
    out = []
    for rank, (line, before) in enumerate(zip(codes, places, strict=True)):
        mine = [n for n, r in reduction_order(graph.modules) if r == rank] if len(before) else []
        after = np.concatenate([[0], 1 + np.flatnonzero(line < sends)])[before]  # behind the operation itself
        open_places = np.append(np.flatnonzero((line < sends) | (line >= receives)), len(line))
        at = open_places[np.searchsorted(open_places, after)]
        out.append(np.insert(line, at, np.array(mine, dtype=np.int32) + first_reduction(graph)).astype(np.int32))
    return tuple(out)


def starts_reductions(plan: Plan) -> bool:
    """Whether the plan says where reductions start."""
    first = first_reduction(plan.graph)
    return any(bool((line >= first).any()) for line in plan.codes)


def reduction_fault(plan: Plan) -> str:
    """The first fault of a plan's reductions by themselves, empty if there is none: a plan has either none, or on each
    rank one for each chunk, in order, behind all of its gradients."""
    if not starts_reductions(plan):
        return ""
    graph, first, decoder = plan.graph, first_reduction(plan.graph), Decoder(plan.graph)
    expected = reduction_order(graph.modules)
    for rank, line in enumerate(plan.codes):
        places = np.flatnonzero(line >= first)
        found = (line[places] - first).tolist()
        mine = [n for n, r in expected if r == rank]

        def at(i: int, rank: int = rank, line: Ints = line) -> str:
            return f"rank {rank}, action {i} ({decoder.action(int(line[i]), rank)})"

        if plan.coupled is None:
            if len(places):
                return f"{at(int(places[0]))}: only plans of replicas that run together say where reductions start"
            continue
        for i, number, due in zip(places.tolist(), found, mine, strict=False):
            if number != due:
                return f"{at(i)}: {decoder.action(due + first, rank)} comes before it, in the order of all replicas"
        if len(found) > len(mine):
            return f"{at(int(places[len(mine)]))}: is started twice"
        if len(found) < len(mine):
            return f"rank {rank}: never starts {decoder.action(mine[len(found)] + first, rank)}"
        operations = np.flatnonzero(line < 4 * graph.virtual_microbatches)
        gradients, chunks = _gradients(graph, line[operations], rank)
        began = dict(zip(found, places.tolist(), strict=True))
        for i, number in zip(operations[gradients].tolist(), chunks.tolist(), strict=True):
            if i > began[number]:
                late = decoder.action(int(line[i]), rank)
                return f"{at(began[number])}: starts before {late} has added its gradient"
    return ""
