"""Zero-bubble pipelines: ZB-H1 and ZB-V, hand-crafted orders with the backward split into B and W.

Zero Bubble Pipeline Parallelism (Qi et al., 2024): section 3 for ZB-H1, section 6 for ZB-V. Both orders are fixed ahead
of time. They are exact for equal F, B and W; where these differ the papers schedule automatically for the profiled
times, so :func:`zb_h1` and :func:`zb_v` also build such an order, from the mean durations of the batch and within the
same number of stages in flight, and keep the one that is faster on the mean durations.
"""

from __future__ import annotations

import numpy as np

from ..core.graph import OperationGraph
from ..core.operations import Kind
from ..core.order import Schedule
from ..core.simulate.reference import simulate
from .common import BaselineError, code, input_gradient, mixed_shape, uniform, weight_gradient
from .mean import mean_graph


def zb_h1(graph: OperationGraph) -> Schedule:
    """ZB-H1 for a mixed graph with one segment: 1F1B's memory, W delayed by ``rank`` microbatches."""
    return _fastest(graph, zb_h1_options(graph)[:2])


def zb_v(graph: OperationGraph) -> Schedule:
    """ZB-V for a mixed graph with two segments, the second one reversed: 1F1B's memory, every rank has both ends."""
    return _fastest(graph, zb_v_options(graph)[:2])


def zb_h1_options(graph: OperationGraph) -> list[Schedule]:
    """Hand-crafted, automatic, and automatic with every W at once, for a caller with a memory limit. Raises
    BaselineError if the graph has more than one module or segment."""
    _, segments = mixed_shape(graph)
    if segments != 1:
        raise BaselineError(f"ZB-H1 has one chunk per rank, the graph has {segments}")
    return [handcrafted_h1(graph), automatic(graph, graph.ranks), handcrafted_h1(graph, delay=0)]


def zb_v_options(graph: OperationGraph) -> list[Schedule]:
    """As :func:`zb_h1_options`, for ZB-V. Raises BaselineError for any other graph than :func:`zb_v`'s."""
    _, segments = mixed_shape(graph)
    if segments != 2 or not graph.modules[0].runs_back(1) or graph.modules[0].runs_back(0):
        raise BaselineError(
            "ZB-V needs two segments per rank, of which the second runs from the last rank to the first"
        )
    limit = 2 * graph.ranks
    return [handcrafted_v(graph), automatic(graph, limit), automatic(graph, limit, eager=True)]


def handcrafted_h1(graph: OperationGraph, delay: int | None = None) -> Schedule:
    """The order of the paper's figure: warm-up as 1F1B; W of microbatch i after B of microbatch i + rank, or, with
    ``delay``, of microbatch i + delay if that comes earlier (0: no more memory than 1F1B on any rank)."""
    microbatches, _ = mixed_shape(graph)
    orders = []
    for rank in range(graph.ranks):
        warmup = min(graph.ranks - rank - 1, microbatches)
        late = rank if delay is None else min(rank, delay)
        order = [code(graph, Kind.F, graph.virtual_microbatch(m, 0)) for m in range(warmup)]
        for m in range(microbatches):
            if m + warmup < microbatches:
                order.append(code(graph, Kind.F, graph.virtual_microbatch(m + warmup, 0)))
            order += input_gradient(graph, graph.virtual_microbatch(m, 0), rank)
            if m >= late:
                order += weight_gradient(graph, graph.virtual_microbatch(m - late, 0), rank)
        for m in range(max(0, microbatches - late), microbatches):
            order += weight_gradient(graph, graph.virtual_microbatch(m, 0), rank)
        orders.append(order)
    return uniform(graph, orders)


def handcrafted_v(graph: OperationGraph) -> Schedule:
    """The order of ZB-V's figure: chunk 0 down, chunk 1 back up, one F, B and W of each in the steady state."""
    microbatches, _ = mixed_shape(graph)
    ranks = graph.ranks
    # The pattern needs 2P-1 microbatches to be filled; with fewer, the surplus ones are left out of it again.
    padded = max(2 * ranks - 1, microbatches)
    return uniform(graph, [_v_order(graph, rank, padded, microbatches) for rank in range(ranks)])


def _v_order(graph: OperationGraph, rank: int, padded: int, microbatches: int) -> list[int]:
    ranks = graph.ranks
    pattern: list[tuple[Kind, int, int]] = []
    done = {(kind, chunk): 0 for kind in (Kind.F, Kind.B, Kind.W) for chunk in (0, 1)}

    def run(kind: Kind, chunk: int) -> None:
        pattern.append((kind, chunk, done[kind, chunk]))
        done[kind, chunk] += 1

    def run_both_gradients(chunk: int) -> None:
        run(Kind.B, chunk)
        run(Kind.W, chunk)

    for _ in range(2 * (ranks - rank) - 1):
        run(Kind.F, 0)
    for _ in range(rank):
        run(Kind.F, 1)
        run(Kind.F, 0)
    for _ in range(ranks - rank):
        run(Kind.F, 1)
        run_both_gradients(1)
    while done[Kind.F, 1] < done[Kind.F, 0] or done[Kind.F, 0] < padded:
        if done[Kind.F, 0] < padded:
            run(Kind.F, 0)
        run_both_gradients(0)
        run(Kind.F, 1)
        run_both_gradients(1)
    for _ in range(rank):
        run(Kind.B, 0)
        run(Kind.B, 1)
    for _ in range(ranks - rank):
        run_both_gradients(0)
    for chunk in (1, 0):
        while done[Kind.W, chunk] < done[Kind.B, chunk]:
            run(Kind.W, chunk)

    order: list[int] = []
    for kind, chunk, m in pattern:
        if m >= microbatches:
            continue
        virtual_microbatch = graph.virtual_microbatch(m, chunk)
        if kind == Kind.F:
            order.append(code(graph, kind, virtual_microbatch))
        else:
            order += (
                input_gradient(graph, virtual_microbatch, rank)
                if kind == Kind.B
                else weight_gradient(graph, virtual_microbatch, rank)
            )
    return order


def automatic(graph: OperationGraph, limit: int, *, eager: bool = False) -> Schedule:
    """A zero-bubble order by list scheduling on the mean durations of the batch.

    Each rank runs what can start first; of what could start together a B, else an F while fewer than ``limit`` stages
    are in flight (from the start of F to the end of W), else a W. A forward of a later segment goes first, and the last
    slots in flight are kept for later segments, without which the head of the pipeline could fill a rank for good.
    ``eager``: W follows its B at once, which holds the least memory and leaves the other ranks the head start alone.
    """
    microbatches, segments = mixed_shape(graph)
    mean = mean_graph(graph)
    ranks, virtual_microbatches = graph.ranks, graph.virtual_microbatches
    order: list[list[int]] = [[] for _ in range(ranks)]
    clock = np.zeros(ranks)
    forward_end = np.full((virtual_microbatches, ranks), np.inf)
    backward_end = np.full((virtual_microbatches, ranks), np.inf)
    end_of = {Kind.F: forward_end, Kind.B: backward_end}
    next_forward = np.zeros((ranks, segments), dtype=int)
    next_backward = np.zeros((ranks, segments), dtype=int)
    owed: list[list[int]] = [[] for _ in range(ranks)]
    in_flight = [0] * ranks

    def arrival(kind: Kind, virtual_microbatch: int, rank: int) -> float:
        ends = [
            end_of[d.kind][d.virtual_microbatch, d.rank] + d.seconds
            for d in mean.inputs(kind, virtual_microbatch, rank)
        ]
        return float(max([0.0, *ends]))

    def options(rank: int) -> list[tuple[float, int, Kind, int]]:
        """(start, preference, kind, virtual microbatch) of what the rank could run next."""
        found = []
        for chunk in range(segments):
            if next_backward[rank, chunk] < next_forward[rank, chunk]:
                virtual_microbatch = graph.virtual_microbatch(int(next_backward[rank, chunk]), chunk)
                found.append(
                    (
                        max(clock[rank], arrival(Kind.B, virtual_microbatch, rank)),
                        chunk - segments,
                        Kind.B,
                        virtual_microbatch,
                    )
                )
            # The reserve grows towards the head: chunk c may use all but (segments - 1 - c) of the slots.
            if next_forward[rank, chunk] < microbatches and in_flight[rank] < limit - (segments - 1 - chunk):
                virtual_microbatch = graph.virtual_microbatch(int(next_forward[rank, chunk]), chunk)
                found.append(
                    (
                        max(clock[rank], arrival(Kind.F, virtual_microbatch, rank)),
                        segments - chunk,
                        Kind.F,
                        virtual_microbatch,
                    )
                )
        if owed[rank]:
            found.append((float(clock[rank]), -2 * segments if eager else 2 * segments, Kind.W, owed[rank][0]))
        return [o for o in found if np.isfinite(o[0])]

    remaining = 3 * microbatches * segments * ranks
    best = [min(options(rank), default=None) for rank in range(ranks)]
    while remaining:
        choices = [(*option, rank) for rank, option in enumerate(best) if option is not None]
        if not choices:
            raise BaselineError(f"no zero-bubble order with {limit} stages in flight per rank")
        start, _, kind, virtual_microbatch, rank = min(choices)
        chunk = graph.segment(virtual_microbatch)
        duration = {Kind.F: mean.forward, Kind.B: mean.backward, Kind.W: mean.weight}[kind][0, virtual_microbatch, rank]
        clock[rank] = start + duration
        if kind == Kind.F:
            order[rank].append(code(graph, Kind.F, virtual_microbatch))
            forward_end[virtual_microbatch, rank] = clock[rank]
            next_forward[rank, chunk] += 1
            in_flight[rank] += 1
        elif kind == Kind.B:
            order[rank] += input_gradient(graph, virtual_microbatch, rank)
            backward_end[virtual_microbatch, rank] = clock[rank]
            next_backward[rank, chunk] += 1
            owed[rank].append(virtual_microbatch)
        else:
            order[rank] += weight_gradient(graph, virtual_microbatch, rank)
            owed[rank].pop(0)
            in_flight[rank] -= 1
        remaining -= 1
        # Only this rank's clock and its neighbours' arrivals have changed.
        for touched in {rank, (rank + 1) % ranks, (rank - 1) % ranks}:
            best[touched] = min(options(touched), default=None)
    return uniform(graph, order)


def _fastest(graph: OperationGraph, options: list[Schedule]) -> Schedule:
    """The fastest on the mean durations; these are fixed before training, so the batch can't choose."""
    mean = mean_graph(graph)
    return min(options, key=lambda schedule: simulate(mean, schedule).iteration_time)
