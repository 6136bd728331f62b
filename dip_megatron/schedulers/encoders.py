"""Orders in which a pipeline of the last module stays as it is and encoders, cut over the same ranks, go around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..core.graph import OperationGraph
from ..core.operations import Kind
from ..core.order import Schedule
from ..core.simulate import simulate_compiled
from ..core.simulate.reference import DeadlockError
from .common import BaselineError, code, fused_backward, uniform
from .fit import Fitted, least_recompute_by_module
from .optimus import backbone, backbone_order


def encoders_first(graph: OperationGraph) -> Schedule:
    """All forwards of the encoders, then Megatron's order of the module they feed, then all backwards of the encoders:
    what a training loop does that encodes a whole batch before its pipeline runs (Megatron-LM #4784; LoongForge, whose
    encoders are data-parallel over the pipeline's ranks where these are cut over them).

    Raises BaselineError if a segment is reversed.
    """
    return _around(graph, lead=len(graph.units), lag=len(graph.units))


def nested_encoders(graph: OperationGraph) -> Fitted:
    """Encoders nested in the pipeline of the module they feed: on each rank a microbatch's encoder forward goes before
    the backbone's forward that is ``lead`` microbatches ahead of it, its backward behind the backbone's backward that
    is ``lag`` behind, so that encoders hold a number of microbatches that doesn't grow with the batch; the best of a
    few leads and lags, with the least recompute of each module that fits.

    After BigMac (arXiv 2605.25451), by its public description: dependency-safe nesting in the LLM's pipeline, constant
    memory of the encoders. Raises BaselineError if a segment is reversed.
    """
    best: Fitted | None = None
    orders = [order for lead, lag in _nestings(graph) if _ends(graph, order := _around(graph, lead, lag))]
    for order in orders or [encoders_first(graph)]:  # where none of them ends
        fitted = least_recompute_by_module(graph, _given(order))
        if best is None or _worth(graph, fitted) < _worth(graph, best):
            best = fitted
    assert best is not None
    return best


def _nestings(graph: OperationGraph) -> Iterator[tuple[int, int]]:
    count = 1 + max(u.microbatch for u in graph.units)
    for lead in sorted({min(n, count) for n in (1, graph.ranks, 2 * graph.ranks)}):
        for lag in sorted({min(n, count) for n in (0, graph.ranks - 1, 2 * graph.ranks)}):
            yield lead, lag


def _worth(graph: OperationGraph, fitted: Fitted) -> tuple[bool, float]:
    over = float(np.max(fitted.timeline.peak_bytes - graph.memory_limit))
    return not fitted.fits, fitted.timeline.iteration_time if fitted.fits else over


def _given(order: Schedule) -> Callable[[OperationGraph], Schedule]:
    return lambda _: order


def _ends(graph: OperationGraph, order: Schedule) -> bool:
    """Whether no rank waits for ever under this order."""
    try:
        simulate_compiled(graph, order)
    except DeadlockError:
        return False
    return True


@dataclass(frozen=True)
class _Item:
    """A virtual microbatch of an encoder: the place of its microbatch, and ``level``, how many chunks from it to the
    backbone; ``rank_in`` and ``rank_out``: among those that may run, in forwards and in backwards."""

    virtual_microbatch: int
    microbatch: int
    level: int
    rank_in: tuple[int, ...]
    rank_out: tuple[int, ...]


def _around(graph: OperationGraph, lead: int, lag: int) -> Schedule:
    """The backbone's own order, and in it the other modules: see :func:`nested_encoders`. What is several chunks away
    from the backbone goes as many times ``lead`` ahead of it, as many times ``lag`` behind."""
    turned = [m.name for m in graph.modules if any(m.reversed)]
    if turned:
        raise BaselineError(f"it keeps Megatron's order, which has no reversed segments as {turned[0]} has")
    name = backbone(graph)
    place = {m: i for i, m in enumerate(sorted({u.microbatch for u in graph.units}))}
    items = _items(graph, name, place)
    entries = [(graph.virtual_microbatch(u.id, 0), place[u.microbatch]) for u in graph.units if u.module == name]
    orders = []
    for rank in range(graph.ranks):
        forwards, backwards = _triggered(items, len(place), lead, lag)
        order = list(map(partial(code, graph, Kind.F), forwards[0]))
        left = {m: sum(1 for _, own in entries if own == m) for m in place.values()}
        entered = dict(entries)
        seen, ended, reached = 0, set[int](), 0
        for kind, s in backbone_order(graph, name, rank):
            if kind == int(Kind.F):
                while s in entered and seen < entered[s]:
                    seen += 1
                    order += map(partial(code, graph, Kind.F), forwards[seen])
                order.append(code(graph, Kind.F, s))
                continue
            order += fused_backward(graph, s, rank)
            if s not in entered:
                continue
            left[entered[s]] -= 1
            if left[entered[s]] == 0:
                ended.add(entered[s])
            while reached in ended:
                order += (o for n in backwards[reached] for o in fused_backward(graph, n, rank))
                reached += 1
        order += (o for n in backwards[len(place)] for o in fused_backward(graph, n, rank))
        orders.append(order)
    return uniform(graph, orders)


def _items(graph: OperationGraph, name: str, place: dict[int, int]) -> list[_Item]:
    """All virtual microbatches but those of the backbone ``name``."""
    after: dict[str, int] = {}  # chunks between a module's last one and the backbone
    for m in reversed(graph.modules):
        following = [d for d in graph.modules if m.name in d.upstream and d.name != name]
        after[m.name] = max((after[d.name] + d.segments for d in following), default=0)
    depth = {m.name: i for i, m in enumerate(graph.modules)}
    items = []
    for s in range(graph.virtual_microbatches):
        unit = graph.units[int(graph.unit_of[s])]
        if unit.module != name:
            k, at, d = graph.segment(s), place[unit.microbatch], depth[unit.module]
            level = after[unit.module] + graph.module(unit.module).segments - k
            items.append(_Item(s, at, level, (d, k, at, unit.id), (-d, -k, at, unit.id)))
    return items


def _triggered(items: Sequence[_Item], count: int, lead: int, lag: int) -> tuple[list[list[int]], list[list[int]]]:
    """Virtual microbatches whose forwards go right before the backbone's first forward of each microbatch, and whose
    backwards go right behind its last backward of each, or, last in the list, at the end."""
    before: list[list[int]] = [[] for _ in range(count)]
    behind: list[list[int]] = [[] for _ in range(count + 1)]
    for item in sorted(items, key=lambda i: i.rank_in):
        before[max(0, item.microbatch - lead * item.level)].append(item.virtual_microbatch)
    for item in sorted(items, key=lambda i: i.rank_out):
        behind[min(count, item.microbatch + lag * item.level)].append(item.virtual_microbatch)
    return before, behind
