"""Time that ranks lose before the pipeline is filled: argument 2 of :mod:`.bounds`, whose notation this is.

*What feeds nothing else, and all before it* (a flow-shop path argument). Let U be a set of modules with all that they
feed, the rest D; no segment may be reversed. Before rank q's first operation of U, which starts at T(q), it runs
forwards of D only, X(q) say: a backward follows forwards of U on its rank. With f(q, X) their work,
idle(q) = T(q) - f(q, X(q)) is the time lost until then. Those in X(q + 1) but not in X(q) ran on rank q after its first
U forward, and on rank q + 1 before T(q + 1): their work on q is at most T(q + 1) - T(q) - u(q) - d, with u(q) the least
U forward on q and d the least transfer of either kind (if there is none, T(q + 1) >= T(q) + u(q) + d still holds, as
that U comes from q). So idle(q + 1) >= idle(q) + u(q) + d - sum over D of max(0, f(q + 1) - f(q)). A rank's time is at
least this idle time plus all of its work plus the least tail. Without split backwards the same holds for the drain,
where the last backward of U passes from the last rank to the first.

*The first wave.* Let E be the forwards of modules that nothing feeds, U those of them that are large, D the other ones,
and h(q) the least head of anything else on ranks up to q. Either each rank up to q has its first U, at T, before its
first operation outside of E could start: before T it then ran forwards of D only, and what is said above holds word by
word. Or some rank up to q has none before h(q): then its T is later than h(q), and so is that of rank q, to which U
comes from there. Rank q itself runs nothing but D before min(T(q), h(q)) = h(q), and has lost h(q) - f(q, D) by then.
So idle(q) is at least the lesser of that and the sum above, for any U: if all are of one size the first one alone fills
a pipeline, and however small some are, it is not full before the first of the large ones has passed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .graph import Floats, OperationGraph

SIZES = 16
"""Sizes from which on forwards are tried as the large ones of the first wave."""


def idle_of_filling(graph: OperationGraph, least: Sequence[Floats], split: bool) -> tuple[Floats, Floats]:
    """Idle time of each rank ``[P]`` before its first and, without split backwards, after its last operation of U, for
    the best U that has all that it feeds."""
    filling, draining = np.zeros(graph.ranks), np.zeros(graph.ranks)
    trained = bool(graph.has_backward.all())
    for inside in upper_sets(graph).values():
        filling = np.maximum(filling, passing(least[0], inside, graph.transfer))
        if not split and trained:
            draining = np.maximum(draining, passing(least[1], inside, graph.transfer))
    return filling, draining


def idle_of_first_wave(graph: OperationGraph, forward: Floats, head: Floats, real: NDArray[np.bool_]) -> Floats:
    """Idle time of each rank ``[P]`` until the first large forward of what nothing feeds, for the best size that is
    called large. ``forward``: least seconds of every node; ``head`` ``[3N]``: least starts of forwards, backwards and
    weight gradients, of which those that are ``real`` run."""
    rows, ranks = graph.virtual_microbatches, graph.ranks
    out = np.zeros(ranks)
    if graph.is_reversed.any():
        return out
    unfed = fed_by_nothing(graph)
    whole = np.array([graph.module(graph.units[int(u)].module).replicated for u in graph.unit_of])
    early = np.zeros((3, rows, ranks), dtype=np.bool_)
    early[0] = unfed[:, None]
    later = np.where(real.reshape(early.shape) & ~early, head.reshape(early.shape), np.inf).min(axis=(0, 1))
    until = np.minimum.accumulate(later)
    first, length = unfed & ~whole, forward.reshape(rows, ranks)
    size = length.sum(axis=1)
    sizes = np.unique(size[first])
    for least in sizes[np.unique(np.linspace(0, len(sizes) - 1, SIZES).round().astype(int))] if len(sizes) else ():
        large = first & (size >= least)
        small = unfed & ~large
        idle = passing(length[large | small], large[large | small], graph.transfer)
        out = np.maximum(out, np.minimum(idle, until - length[small].sum(axis=0)))
    return out


def fed_by_nothing(graph: OperationGraph) -> NDArray[np.bool_]:
    """The virtual microbatches ``[S]`` of modules without upstream."""
    return np.array([not graph.module(graph.units[int(u)].module).upstream for u in graph.unit_of])


def upper_sets(graph: OperationGraph) -> dict[frozenset[int], NDArray[np.bool_]]:
    """Each U that argument 2 holds for, by the numbers of its modules: the virtual microbatches ``[S]`` in it."""
    if graph.is_reversed.any():
        return {}
    module = np.array([[m.name for m in graph.modules].index(graph.units[int(u)].module) for u in graph.unit_of])
    out = {}
    for upper in _closed_sets(graph):
        inside = np.isin(module, list(upper))
        whole = any(graph.modules[i].replicated for i in upper)  # a unit of it has passed no rank before its own
        if not whole and inside.any() and _all_lead_to(graph, inside):
            out[upper] = inside
    return out


def passing(length: Floats, inside: NDArray[np.bool_], transfer: Floats) -> Floats:
    """The recursion of argument 2 over ranks; ``length`` ``[S, P]``."""
    idle = np.zeros(length.shape[1])
    for q in range(length.shape[1] - 1):
        slack = np.maximum(length[~inside, q + 1] - length[~inside, q], 0.0).sum()
        idle[q + 1] = max(0.0, idle[q] + length[inside, q].min() + transfer.min() - slack)
    return idle


def _closed_sets(graph: OperationGraph) -> list[frozenset[int]]:
    """Sets of modules (by number) that contain all that they feed: each module with everything after it, and unions
    along the listing order."""
    number = {m.name: i for i, m in enumerate(graph.modules)}
    below: list[set[int]] = [{i} for i in range(len(graph.modules))]
    for i in range(len(graph.modules) - 1, -1, -1):
        for name in graph.modules[i].upstream:
            below[number[name]] |= below[i]
    suffixes = [frozenset(range(i, len(graph.modules))) for i in range(len(graph.modules))]
    return sorted({*map(frozenset, below), *suffixes}, key=sorted)


def _all_lead_to(graph: OperationGraph, inside: NDArray[np.bool_]) -> bool:
    """Whether each one outside has one inside among those it leads to, so that its backward follows one."""
    leads = inside.copy()
    changed = True
    while changed:
        changed = False
        for s in np.flatnonzero(~leads):
            if any(leads[n] for n in graph.next_virtual_microbatches[s]):
                leads[s] = changed = True
    return bool(leads.all())
