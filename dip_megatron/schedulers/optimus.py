"""Optimus at coarse granularity: encoders in the bubbles of the backbone's own pipeline."""

from __future__ import annotations

import numpy as np

from ..core.graph import OperationGraph
from ..core.operations import Kind
from ..core.order import Schedule
from ..core.simulate.reference import simulate
from .common import BaselineError, code, fused_backward, uniform
from .megatron import legal_group, warmup_count

_FORWARD, _BACKWARD = int(Kind.F), int(Kind.BW)


def optimus_coarse(graph: OperationGraph) -> Schedule:
    """Optimus (Feng et al., 2024) with coarse bubble filling, as the paper's authors re-implemented it.

    The backbone (the module that the others feed) keeps Megatron's order of its own chunks: 1F1B or interleaved. The
    other modules, in segments of their own on the same ranks, run in natural order wherever the backbone waits: before
    its first stage, after its last and in the bubbles between. Encoder forwards go ahead of the backbone by a fixed
    number of microbatches, the best of a few; nothing else is reordered and no backward is split. Raises BaselineError
    if a segment is reversed, for which Megatron has no order.
    """
    return min(optimus_leads(graph), key=lambda schedule: simulate(graph, schedule).iteration_time)


def optimus_leads(graph: OperationGraph) -> list[Schedule]:
    """The schedules among which :func:`optimus_coarse` picks, least memory first; for a caller with a memory limit."""
    turned = [m.name for m in graph.modules if any(m.reversed)]
    if turned:
        raise BaselineError(f"Optimus keeps Megatron's order, which has no reversed segments as {turned[0]} has")
    return [_fill_bubbles(graph, ahead) for ahead in _leads(graph)]


def _leads(graph: OperationGraph) -> list[int]:
    microbatches = 1 + max(u.microbatch for u in graph.units)
    return sorted({min(n, microbatches) for n in (1, graph.ranks // 2 + 1, graph.ranks, 2 * graph.ranks, microbatches)})


def backbone(graph: OperationGraph) -> str:
    """The module that feeds no other (of several the one with the most work): its backward never waits for its own
    later forwards, so that Megatron's order of it can't hang."""
    feeding = {name for m in graph.modules for name in m.upstream}
    work = {m.name: 0.0 for m in graph.modules if m.name not in feeding}
    for s in range(graph.virtual_microbatches):
        name = graph.units[int(graph.unit_of[s])].module
        if name in work:
            work[name] += float((graph.forward[0, s] + graph.fused[0, s]).sum())
    return max(work, key=lambda name: work[name])


def backbone_order(graph: OperationGraph, name: str, rank: int) -> list[tuple[int, int]]:
    """Megatron's order of the backbone's own stages: (kind, virtual microbatch)."""
    units = sorted((u for u in graph.units if u.module == name), key=lambda u: (u.microbatch, u.id))
    segments, count, ranks = graph.module(name).segments, len(units), graph.ranks
    if segments > 1 and count >= ranks:
        size = legal_group(count, ranks)
        warmup = warmup_count(count, segments, ranks, rank, size)
    else:
        size = count
        warmup = min(ranks - rank - 1 + (segments - 1) * count, count * segments)
    forward: list[tuple[int, int]] = []
    backward: list[tuple[int, int]] = []
    for first in range(0, count, size if segments > 1 else 1):
        group = units[first : first + (size if segments > 1 else 1)]
        forward += [(_FORWARD, graph.virtual_microbatch(u.id, k)) for k in range(segments) for u in group]
        backward += [(_BACKWARD, graph.virtual_microbatch(u.id, k)) for k in reversed(range(segments)) for u in group]
    order = forward[:warmup]
    for i in range(len(forward) - warmup):
        order += [forward[warmup + i], backward[i]]
    return order + backward[len(forward) - warmup :]


def _fill_bubbles(graph: OperationGraph, ahead: int) -> Schedule:
    """Timed list scheduling: the backbone in its fixed order, the other modules where it waits."""
    name = backbone(graph)
    ranks = graph.ranks
    fixed = [backbone_order(graph, name, rank) for rank in range(ranks)]
    place_of = {m: i for i, m in enumerate(sorted({u.microbatch for u in graph.units}))}
    place = [place_of[graph.units[int(u)].microbatch] for u in graph.unit_of]
    module_place = {m.name: i for i, m in enumerate(graph.modules)}
    depth = [module_place[graph.units[int(u)].module] for u in graph.unit_of]
    main = module_place[name]
    heads = set(graph.first_virtual_microbatch)
    # By rank 0, where the backbone starts: a later rank may wait for an encoder stage that rank 0 needs first.
    reached = _reached(fixed[0], place, heads, len(place_of))
    others = [
        (place[s], module, graph.segment(s), s)
        for s in range(graph.virtual_microbatches)
        if (module := depth[s]) != main
    ]
    forwards = [s for *_, s in sorted(others)]
    backwards = [s for *_, s in sorted(others, key=lambda key: (key[0], -key[1], -key[2], key[3]))]

    end: dict[tuple[int, int, int], float] = {}
    clock = np.zeros(ranks)
    orders: list[list[int]] = [[] for _ in range(ranks)]
    at, nf, nb = [0] * ranks, [0] * ranks, [0] * ranks

    def start(kind: int, virtual_microbatch: int, rank: int) -> float:
        return max(float(clock[rank]), _arrival(graph, end, kind, virtual_microbatch, rank))

    def candidates(rank: int) -> list[tuple[float, int, int, int]]:
        """(start, preference, kind, virtual microbatch) of the heads of the rank's three queues."""
        found = []
        if nf[rank] < len(forwards) and place[forwards[nf[rank]]] < reached[at[0]] + ahead:
            virtual_microbatch = forwards[nf[rank]]
            found.append((start(_FORWARD, virtual_microbatch, rank), 0, _FORWARD, virtual_microbatch))
        if at[rank] < len(fixed[rank]):
            kind, virtual_microbatch = fixed[rank][at[rank]]
            found.append((start(kind, virtual_microbatch, rank), 1, kind, virtual_microbatch))
        if nb[rank] < len(backwards):
            virtual_microbatch = backwards[nb[rank]]
            found.append((start(_BACKWARD, virtual_microbatch, rank), 2, _BACKWARD, virtual_microbatch))
        return [f for f in found if np.isfinite(f[0])]

    remaining = 2 * graph.virtual_microbatches * ranks
    while remaining:
        begin, _, kind, virtual_microbatch, rank = min((*min(c), r) for r in range(ranks) if (c := candidates(r)))
        if kind == _FORWARD:
            duration = graph.forward[0, virtual_microbatch, rank]
        elif graph.has_backward[virtual_microbatch, rank]:
            duration = (graph.fused if graph.has_weight[virtual_microbatch, rank] else graph.backward)[
                0, virtual_microbatch, rank
            ]
        else:
            duration = 0.0
        clock[rank] = begin + duration
        end[kind, virtual_microbatch, rank] = float(clock[rank])
        if kind == _FORWARD:
            orders[rank].append(code(graph, Kind.F, virtual_microbatch))
        else:
            orders[rank] += fused_backward(graph, virtual_microbatch, rank)
        if at[rank] < len(fixed[rank]) and fixed[rank][at[rank]] == (kind, virtual_microbatch):
            at[rank] += 1
        elif kind == _FORWARD:
            nf[rank] += 1
        else:
            nb[rank] += 1
        remaining -= 1
    return uniform(graph, orders)


def _reached(line: list[tuple[int, int]], place: list[int], heads: set[int], count: int) -> list[int]:
    """The earliest microbatch whose first backbone forward is still to come, before each position of the order."""
    reached = [count]
    for kind, virtual_microbatch in reversed(line):
        first = kind == _FORWARD and virtual_microbatch in heads
        reached.append(min(reached[-1], place[virtual_microbatch]) if first else reached[-1])
    return reached[::-1]


def _arrival(
    graph: OperationGraph, end: dict[tuple[int, int, int], float], kind: int, virtual_microbatch: int, rank: int
) -> float:
    """When the inputs of an operation are there (seconds; inf if one has not been scheduled)."""
    ends = [
        end.get((_FORWARD if d.kind == Kind.F else _BACKWARD, d.virtual_microbatch, d.rank), float("inf")) + d.seconds
        for d in graph.inputs(Kind(kind), virtual_microbatch, rank)
    ]
    return max([0.0, *ends])
