"""What meeting adds to the bounds of replicas that run together.

Each replica's plan, run with others, takes at least as long as alone, so that the bound of :mod:`.bounds` of every
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
before (argument 2 of :mod:`.bounds`), loses that time on top of its work: events only last longer than what is assumed
there, if modules with experts are among those that fill. Where all that fills a rank meets there, the first one lasts
as long as its longest member, which in each replica is at least the shortest that this one has: u(q) is the most of
what the replicas have for it. The first wave passes through modules that nothing feeds; unless any of these meet it is
each replica's own, and what follows it starts no earlier than it would alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .experts import ExpertLayers, chunk_numbers
from .fill_bounds import fed_by_nothing, passing, upper_sets
from .graph import Floats, Ints, OperationGraph


class Bounded(NamedTuple):
    """A replica's bound in ``seconds`` with what it is made of: the least forward, input gradient and rest of the
    backward of every operation ``[S, P]``; the time ``[P]`` that each rank loses while it is ``filling``, what of it
    the first ``wave`` takes, and the least ``tail`` that follows its last operation, all on top of its work."""

    seconds: float
    forward: Floats
    backward: Floats
    rest: Floats
    filling: Floats
    wave: Floats
    tail: Floats


def seconds_where_replicas_meet(
    graphs: Sequence[OperationGraph], experts: ExpertLayers, alone: Sequence[Bounded]
) -> float:  # fmt: skip
    """Seconds that the busiest rank of a replica takes at least; ``alone[replica]`` is its bound by itself.

    Raises:
        ValueError: If replicas have different numbers of operations of a chunk with experts.
    """
    meets = [experts.meets(graph) for graph in graphs]
    shared = _events(alone, meets, [chunk_numbers(graph) for graph in graphs])
    filling = _filling(graphs, alone, meets)
    bound = 0.0
    for g, x in enumerate(alone):
        apart = np.where(meets[g], 0.0, x.forward + x.backward + x.rest).sum(axis=0)
        bound = max(bound, float((apart + shared[g] + filling[g] + x.tail).max()) * (1.0 - 1e-12))
    return bound


def _events(
    alone: Sequence[Bounded], meets: Sequence[NDArray[np.bool_]], chunks: Sequence[Ints]
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
                raise ValueError(f"replicas have {sorted(counts)} forwards of one chunk with experts on rank {p}")
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
