"""Megatron-LM's pipeline orders, operation by operation as ``megatron.core.pipeline_parallel.schedules`` runs them.

The formulas are those of Megatron-Core 0.16 to 0.19: ``forward_backward_pipelining_without_interleaving``,
``get_pp_rank_microbatches`` and ``get_schedule_table``. Communication is taken as overlapped with computation, which is
kind to Megatron: upstream waits in several places where these plans don't.
"""

from __future__ import annotations

from ..core.graph import OperationGraph
from ..core.operations import Kind
from ..core.order import Schedule
from .common import BaselineError, code, fused_backward, mixed_shape, uniform


def one_forward_one_backward(graph: OperationGraph) -> Schedule:
    """Megatron's non-interleaved 1F1B for a mixed graph with one segment.

    Rank r runs ``ranks - r - 1`` forwards to warm up, then one forward and one backward in turns, then the remaining
    backwards. Raises BaselineError if the graph has more than one module or segment.
    """
    microbatches, segments = mixed_shape(graph)
    if segments != 1:
        raise BaselineError(f"1F1B has one chunk per rank, the graph has {segments}; use the interleaved schedule")
    orders = []
    for rank in range(graph.ranks):
        warmup = min(graph.ranks - rank - 1, microbatches)
        table = [(m, 0) for m in range(microbatches)]
        orders.append(_in_turns(graph, rank, warmup, table, segments))
    return uniform(graph, orders)


def interleaved(graph: OperationGraph, group: int | None = None) -> Schedule:
    """Megatron's interleaved 1F1B (virtual pipeline) for a mixed graph with V >= 2 segments.

    ``group`` is Megatron's ``--microbatch-group-size-per-virtual-pipeline-stage``; None takes :func:`legal_group`.
    Raises BaselineError where Megatron would refuse to run.
    """
    microbatches, segments = mixed_shape(graph)
    if segments < 2:
        raise BaselineError("the interleaved schedule needs two or more chunks per rank; use 1F1B for one")
    if graph.ranks < 2:
        raise BaselineError("the interleaved schedule needs two or more pipeline ranks; merge the chunks into one")
    group = legal_group(microbatches, graph.ranks) if group is None else group
    check_group(microbatches, graph.ranks, group)
    table = schedule_table(microbatches, segments, group)
    orders = [
        _in_turns(graph, rank, warmup_count(microbatches, segments, graph.ranks, rank, group), table, segments)
        for rank in range(graph.ranks)
    ]
    return uniform(graph, orders)


def schedule_table(microbatches: int, segments: int, group: int) -> list[tuple[int, int]]:
    """Megatron's ``get_schedule_table``: (microbatch, chunk) of each virtual microbatch, in forward order."""
    table: list[tuple[int, int]] = []
    for first in range(0, microbatches, group):
        members = range(first, min(first + group, microbatches))
        table.extend((m, chunk) for chunk in range(segments) for m in members)
    return table


def warmup_count(microbatches: int, segments: int, ranks: int, rank: int, group: int) -> int:
    """Megatron's ``get_pp_rank_microbatches``: forwards of ``rank`` before its first forward-backward turn."""
    return min((ranks - rank - 1) * 2 + (segments - 1) * group, microbatches * segments)


def check_group(microbatches: int, ranks: int, group: int) -> None:
    """Megatron's two conditions on a group of microbatches. Raises BaselineError with the reason."""
    if not ranks <= group <= microbatches:
        raise BaselineError(
            f"Megatron's interleaved schedule needs groups of {ranks} (ranks) to {microbatches} (microbatches), got "
            f"{group}; use at least {ranks} microbatches or 1F1B"
        )
    if 0 < microbatches % group < ranks:
        raise BaselineError(
            f"Megatron refuses {microbatches} microbatches in groups of {group} on {ranks} ranks: the last group of "
            f"{microbatches % group} is smaller than the pipeline; use a multiple of {ranks}"
        )


def legal_group(microbatches: int, ranks: int) -> int:
    """The smallest group size Megatron accepts (the number of ranks whenever the batch is a multiple of it)."""
    for group in range(ranks, microbatches + 1):
        if not 0 < microbatches % group < ranks:
            return group
    raise BaselineError(
        f"Megatron's interleaved schedule can't run {microbatches} microbatches on {ranks} ranks; use at least {ranks}"
    )


def _in_turns(graph: OperationGraph, rank: int, warmup: int, table: list[tuple[int, int]], segments: int) -> list[int]:
    """Warm up with ``warmup`` forwards of the table, then one forward and one backward in turns, then backwards."""
    forwards = [code(graph, Kind.F, graph.virtual_microbatch(m, chunk)) for m, chunk in table]
    backwards = [fused_backward(graph, graph.virtual_microbatch(m, segments - 1 - chunk), rank) for m, chunk in table]
    order = forwards[:warmup]
    steady = len(table) - warmup
    for i in range(steady):
        order.append(forwards[warmup + i])
        order.extend(backwards[i])
    for operations in backwards[steady:]:
        order.extend(operations)
    return order
