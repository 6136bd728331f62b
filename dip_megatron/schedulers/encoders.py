"""Orders in which a pipeline of the last module stays as it is and encoders, cut over the same ranks, go around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..core.graph import StageGraph
from ..core.operations import Kind
from ..core.order import Schedule
from ..core.simulate import simulate_compiled
from ..core.simulate.reference import DeadlockError
from .common import BaselineError, code, fused_backward, uniform
from .fit import Fitted, least_recompute_by_module
from .optimus import backbone, backbone_order


def encoders_first(graph: StageGraph) -> Schedule:
    """All forwards of the encoders, then Megatron's order of the module they feed, then all backwards of the encoders:
    what a training loop does that encodes a whole batch before its pipeline runs (Megatron-LM #4784; LoongForge, whose
    encoders are data-parallel over the pipeline's ranks where these are cut over them).

    Raises BaselineError if a segment is reversed.
    """
    return _around(graph, lead=len(graph.units), lag=len(graph.units))


def nested_encoders(graph: StageGraph) -> Fitted:
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


def _nestings(graph: StageGraph) -> Iterator[tuple[int, int]]:
    count = 1 + max(u.microbatch for u in graph.units)
    for lead in sorted({min(n, count) for n in (1, graph.ranks, 2 * graph.ranks)}):
        for lag in sorted({min(n, count) for n in (0, graph.ranks - 1, 2 * graph.ranks)}):
            yield lead, lag


def _worth(graph: StageGraph, fitted: Fitted) -> tuple[bool, float]:
    over = float(np.max(fitted.timeline.peak_bytes - graph.memory_limit))
    return not fitted.fits, fitted.timeline.iteration_time if fitted.fits else over


def _given(order: Schedule) -> Callable[[StageGraph], Schedule]:
    return lambda _: order


def _ends(graph: StageGraph, order: Schedule) -> bool:
    """Whether no rank waits for ever under this order."""
    try:
        simulate_compiled(graph, order)
    except DeadlockError:
        return False
    return True


def _around(graph: StageGraph, lead: int, lag: int) -> Schedule:
    """The backbone's own order, and in it the other modules: see :func:`nested_encoders`."""
    turned = [m.name for m in graph.modules if any(m.reversed)]
    if turned:
        raise BaselineError(f"it keeps Megatron's order, which has no reversed segments as {turned[0]} has")
    name = backbone(graph)
    place = {m: i for i, m in enumerate(sorted({u.microbatch for u in graph.units}))}
    depth = {m.name: i for i, m in enumerate(graph.modules)}
    others = [s for s in range(graph.virtual_microbatches) if graph.units[int(graph.unit_of[s])].module != name]

    def natural(s: int) -> tuple[int, int, int, int]:
        unit = graph.units[int(graph.unit_of[s])]
        return place[unit.microbatch], depth[unit.module], unit.id, graph.segment(s)

    forwards = sorted(others, key=natural)
    backwards = sorted(others, key=lambda s: (natural(s)[0], -natural(s)[1], natural(s)[2], -natural(s)[3]))
    forward_of = [[s for s in forwards if natural(s)[0] == m] for m in range(len(place))]
    backward_of = [[s for s in backwards if natural(s)[0] == m] for m in range(len(place))]
    entry = {s for unit in graph.units if unit.module == name for s in [graph.virtual_microbatch(unit.id, 0)]}
    orders = [
        _rank_order(graph, backbone_order(graph, name, rank), rank, entry, place, forward_of, backward_of, lead, lag)
        for rank in range(graph.ranks)
    ]
    return uniform(graph, orders)


def _rank_order(
    graph: StageGraph, line: Sequence[tuple[int, int]], rank: int, entry: set[int], place: dict[int, int],
    forward_of: Sequence[Sequence[int]], backward_of: Sequence[Sequence[int]], lead: int, lag: int,
) -> list[int]:  # fmt: skip
    """One rank's order; ``line`` is the backbone's, ``entry`` are the virtual microbatches of its first segment."""
    count = len(place)
    order: list[int] = []
    encoded = returned = 0
    ended: set[int] = set()
    left = dict.fromkeys(range(count), 0)
    for s in entry:
        left[place[graph.units[int(graph.unit_of[s])].microbatch]] += 1

    def forwards_until(microbatch: int) -> None:
        nonlocal encoded
        while encoded < min(microbatch, count):
            order.extend(code(graph, Kind.F, s) for s in forward_of[encoded])
            encoded += 1

    def backwards_until(microbatch: int) -> None:
        nonlocal returned
        while returned < min(microbatch, count):
            for s in backward_of[returned]:
                order.extend(fused_backward(graph, s, rank))
            returned += 1

    for kind, s in line:
        microbatch = place[graph.units[int(graph.unit_of[s])].microbatch]
        if kind == int(Kind.F):
            if s in entry:
                forwards_until(microbatch + 1 + lead)
            order.append(code(graph, Kind.F, s))
            continue
        order.extend(fused_backward(graph, s, rank))
        if s in entry:
            left[microbatch] -= 1
            if left[microbatch] == 0:
                ended.add(microbatch)
            reached = next((m for m in range(count) if m not in ended), count)
            backwards_until(reached - lag)
    forwards_until(count)
    backwards_until(count)
    return order
