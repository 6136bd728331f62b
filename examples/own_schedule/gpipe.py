"""GPipe over modality segments: a schedule of one's own, as docs/add-a-schedule.md builds it."""

from __future__ import annotations

from dip_megatron.core import Kind, Schedule
from dip_megatron.schedulers.common import code, fused_backward, uniform
from dip_megatron.schedulers.entry import LeastRecompute, Problem, ScheduleEntry


def all_forwards_first(problem: Problem) -> list[Schedule]:
    """Every forward in the order of microbatches, then every backward the other way round."""
    graph = problem.graph
    place = {module.name: i for i, module in enumerate(graph.modules)}

    def natural(s: int) -> tuple[int, int, int, int]:
        unit = graph.units[int(graph.unit_of[s])]
        return unit.microbatch, place[unit.module], unit.id, graph.segment(s)

    line = sorted(range(graph.virtual_microbatches), key=natural)
    orders = []
    for rank in range(graph.ranks):
        order = [code(graph, Kind.F, s) for s in line]
        for s in reversed(line):
            order += fused_backward(graph, s, rank)
        orders.append(order)
    return [uniform(graph, orders)]


GPIPE = ScheduleEntry(
    name="gpipe",
    summary="GPipe: all forwards, then all backwards",
    find=LeastRecompute(all_forwards_first),
)
