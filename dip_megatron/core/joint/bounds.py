"""A proven lower bound on the time of every set of joint plans, and one for a given pairing.

Each replica's plan, run with others, takes at least as long as alone, so that the bound of :mod:`..bounds` of every
replica holds. What meeting adds to it:

*Work.* The k-th event of a chunk on a rank lasts at least the longest forward of its members; over all events of the
chunk that sum is least if the k-th longest of each replica meet (the exchange argument: for any pairing, the i-th
largest of the maxima is at least the largest of the i-th largest values). A backward of an event lasts at least the
longest input gradient of its members; a replica that runs its weight gradient apart adds that, one that runs it in the
event, fused, is in it for the longer of its own whole backward and the others' input gradients. So a replica's rank
spends on the event at least max(longest b of the others, own whole backward), and again the sum over a chunk is least
where all are sorted. To this comes all that the replica runs by itself there. Pairs are free to differ from chunk to
chunk and from rank to rank in this, as they are in what may run.

*Filling.* A rank that must wait until the first operation of the last modules arrives, and has too little else to do
before (argument 2 of :mod:`..bounds`), loses that time on top of its work: events only last longer than what is assumed
there, if modules with experts are among those that fill. Where all that fills a rank meets there, the first one lasts
as long as its longest member, which in each replica is at least the shortest that this one has: u(q) is the most of
what the replicas have for it. The first wave passes through modules that nothing feeds; unless any of these meet it is
each replica's own, and what follows it starts no earlier than it would alone.

With a pairing given, each replica's graph gets the durations of its events and its bound is taken: critical path, heads
and tails then know of the waits, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..bounds import Bounded, bounded, lower_bound
from ..experts import ExpertLayers
from ..fill_bounds import fed_by_nothing, passing, upper_sets
from ..graph import Floats, OperationGraph
from ..reductions import chunk_numbers


def joint_lower_bound(graphs: Sequence[OperationGraph], experts: ExpertLayers, *, split: bool = True) -> float:
    """Seconds below which no joint plan of these graphs can be, whatever meets. ``split`` False: without split
    backwards. Raises ValueError if the replicas don't have the same number of stages in each chunk with experts."""
    alone = [bounded(graph, split=split) for graph in graphs]
    bound = max(x.seconds for x in alone)
    meets = [experts.meets(graph) for graph in graphs]
    shared = _events(alone, meets, [chunk_numbers(graph) for graph in graphs])
    filling = _filling(graphs, alone, meets)
    for g, x in enumerate(alone):
        own = np.where(meets[g], 0.0, x.forward + x.backward + x.rest).sum(axis=0)
        bound = max(bound, float((own + shared[g] + filling[g] + x.tail).max()) * (1.0 - 1e-12))
    return bound


def _events(
    alone: Sequence[Bounded], meets: Sequence[NDArray[np.bool_]], chunks: Sequence[NDArray[np.int32]]
) -> Floats:  # fmt: skip
    """Least seconds ``[replica, rank]`` that a replica's rank spends in events and on the weight gradients of their
    stages."""
    replicas, ranks = len(meets), meets[0].shape[1]
    total = np.zeros((replicas, ranks))
    for p in range(ranks):
        for chunk in np.unique(chunks[0][meets[0][:, p]]):
            rows = [np.flatnonzero((c == chunk) & m[:, p]) for c, m in zip(chunks, meets, strict=True)]
            counts = {len(r) for r in rows}
            if len(counts) > 1:
                raise ValueError(f"replicas have {sorted(counts)} stages of one chunk with experts on rank {p}")
            f, b, w = (
                np.stack([getattr(x, name)[r, p] for x, r in zip(alone, rows, strict=True)])
                for name in ("forward", "backward", "rest")
            )
            longest_f, longest_b, longest = (np.sort(x, axis=1).max(axis=0) for x in (f, b, f + b))
            # Either sum may be the greater one: forwards and backwards sorted apart, or both together.
            apart = longest_f.sum() + np.maximum(longest_b, np.sort(b + w, axis=1)).sum(axis=1)
            total[:, p] += np.maximum(apart, np.maximum(longest, np.sort(f + b + w, axis=1)).sum(axis=1))
    return total


def _filling(graphs: Sequence[OperationGraph], alone: Sequence[Bounded], meets: Sequence[NDArray[np.bool_]]) -> Floats:
    """Seconds ``[replica, rank]`` that each rank loses before it is filled: in the first wave, or for the best set of
    modules that has all that meets: what is left out takes just what is assumed then."""
    own = not any(bool(m[fed_by_nothing(graph)].any()) for graph, m in zip(graphs, meets, strict=True))
    out = np.stack([x.wave if own else np.zeros_like(x.wave) for x in alone])
    sets = [upper_sets(graph) for graph in graphs]
    for upper in sets[0]:
        members = [each[upper] for each in sets if upper in each]
        if len(members) < len(graphs) or not all(i[m.any(axis=1)].all() for i, m in zip(members, meets, strict=True)):
            continue
        common = np.stack([m[inside].all(axis=0) for m, inside in zip(meets, members, strict=True)]).all(axis=0)
        first = np.max([x.forward[inside].min(axis=0) for x, inside in zip(alone, members, strict=True)], axis=0)
        for g, (graph, inside) in enumerate(zip(graphs, members, strict=True)):
            length = alone[g].forward.copy()
            length[inside] = np.where(common, np.maximum(length[inside], first), length[inside])
            out[g] = np.maximum(out[g], passing(length, inside, graph.transfer))
    return out


def paired_lower_bound(
    graphs: Sequence[OperationGraph], experts: ExpertLayers, rows: Sequence[NDArray[np.int64]], *, split: bool = True
) -> float:
    """:func:`joint_lower_bound` where virtual microbatches ``rows[g][k]`` of the replicas meet, on every rank."""
    return max(lower_bound(graph, split=split) for graph in raised(graphs, experts, rows))


def raised(
    graphs: Sequence[OperationGraph], experts: ExpertLayers, rows: Sequence[NDArray[np.int64]]
) -> list[OperationGraph]:  # fmt: skip
    """Each replica's graph with no stage that meets shorter than its event at least is."""
    meets = np.stack([experts.meets(graph)[r] for graph, r in zip(graphs, rows, strict=True)])
    least: dict[str, Floats] = {}
    for name in ("forward", "backward"):
        fastest = [getattr(graph, name) for graph in graphs]
        if name == "backward":
            fastest = [np.minimum(x, graph.fused) for x, graph in zip(fastest, graphs, strict=True)]
        each = np.stack([x[:, r].min(axis=0) for x, r in zip(fastest, rows, strict=True)])
        least[name] = np.where(meets, each, 0.0).max(axis=0)
    out = []
    for graph, r in zip(graphs, rows, strict=True):
        arrays = {name: getattr(graph, name).copy() for name in ("forward", "backward", "fused")}
        for name, source in (("forward", "forward"), ("backward", "backward"), ("fused", "backward")):
            arrays[name][:, r] = np.maximum(arrays[name][:, r], least[source][None])
        out.append(replace(graph, **arrays))
    return out
