"""Orders as the CSV of actions that ``torch.distributed.pipelining`` reads: one line per rank, such as ``0F0,0F1,0B0``.

A cell is a virtual stage, an action (F; B, the whole backward; I, the input gradient; W, the weight gradient) and a
microbatch; an empty cell is a pause. The format describes one chain of stages through which every microbatch passes
whole. Graphs that it can't describe are errors (units smaller than a microbatch, modules that several others feed,
nodes without a backward). Durations, payloads and memory strategies are left out.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .graph import OperationGraph
from .modules import ModalityModule, Unit
from .operations import Kind
from .order import Schedule, check_complete

_CELL = re.compile(r"(\d+)(F|I|B|W)(\d+)")
_WORDS = {Kind.F: "F", Kind.BW: "B", Kind.B: "I", Kind.W: "W"}
_KINDS = {word: kind for kind, word in _WORDS.items()}
_MOST = 1 << 14  # stages and microbatches; more are a typing error


class ActionCsvError(ValueError):
    """A CSV of actions that can't be read, or an order that the format can't describe. The message names the place."""


class _Chain:
    """The virtual stages of a graph, numbered along the path of a microbatch."""

    def __init__(self, graph: OperationGraph):
        """Raises ActionCsvError if the graph is no chain of stages for whole microbatches."""
        self.graph = graph
        for before, module in zip((None, *graph.modules), graph.modules, strict=False):
            if module.replicated:
                raise ActionCsvError(f"module {module.name} is replicated: the CSV knows one chain of stages")
            if module.upstream != (() if before is None else (before.name,)):
                fed = ", ".join(module.upstream) or "nothing"
                raise ActionCsvError(f"module {module.name} is fed by {fed}: the CSV knows one chain of stages")
        self._offset, count = {}, 0
        for module in graph.modules:
            self._offset[module.name] = count
            count += module.segments
        self.stages = count * graph.ranks
        self._unit: dict[tuple[str, int], int] = {}
        for unit in graph.units:
            key = (unit.module, unit.microbatch)
            if key in self._unit:
                raise ActionCsvError(
                    f"microbatch {unit.microbatch} has several units of {unit.module}: the CSV knows whole microbatches"
                )
            self._unit[key] = unit.id
        self.microbatches = 1 + max(unit.microbatch for unit in graph.units)
        for module in graph.modules:
            for m in range(self.microbatches):
                if (module.name, m) not in self._unit:
                    raise ActionCsvError(
                        f"microbatch {m} has nothing for {module.name}: in the CSV it passes every stage"
                    )

    def stage(self, s: int, rank: int) -> int:
        """The number of the stage of a virtual microbatch on a rank."""
        graph = self.graph
        unit = graph.units[int(graph.unit_of[s])]
        along = graph.ranks - 1 - rank if graph.is_reversed[s] else rank
        return (self._offset[unit.module] + graph.segment(s)) * graph.ranks + along

    def place(self, stage: int, microbatch: int) -> tuple[int, int]:
        """(virtual microbatch, rank) of a stage for a microbatch."""
        graph = self.graph
        segment, place = divmod(stage, graph.ranks)
        name = next(m.name for m in reversed(graph.modules) if self._offset[m.name] <= segment)
        s = graph.virtual_microbatch(self._unit[name, microbatch], segment - self._offset[name])
        return s, graph.ranks - 1 - place if graph.is_reversed[s] else place


def format_actions(graph: OperationGraph, schedule: Schedule) -> str:
    """The CSV of a schedule. Raises ActionCsvError if the format can't describe it."""
    chain, out = _Chain(graph), io.StringIO()
    without, ranks = np.nonzero(~graph.has_backward)
    if len(without):
        raise ActionCsvError(
            f"{graph.operation(Kind.F, int(without[0]), int(ranks[0]))} has no backward: "
            "the CSV has one for every stage"
        )
    writer = csv.writer(out, lineterminator="\n")
    for rank, order in enumerate(schedule.orders):
        cells = []
        for code in order.tolist():
            kind, s = Kind(code // graph.virtual_microbatches), code % graph.virtual_microbatches
            if kind == Kind.B and not graph.has_weight[s, rank]:
                kind = Kind.BW  # the node's whole backward
            unit = graph.units[int(graph.unit_of[s])]
            cells.append(f"{chain.stage(s, rank)}{_WORDS[kind]}{unit.microbatch}")
        writer.writerow(cells)
    return out.getvalue()


def parse_actions(text: str, graph: OperationGraph) -> Schedule:
    """The order that a CSV describes for ``graph``. Every node gets its fastest memory strategy.

    Raises:
        ActionCsvError: ``rank R, action I (CELL): reason``, if the graph has no such operation or the order is
            incomplete.
    """
    chain, orders = _Chain(graph), []
    lines = list(_lines(text))
    if len(lines) != graph.ranks:
        raise ActionCsvError(f"{len(lines)} lines for {graph.ranks} pipeline ranks")
    for rank, line in enumerate(lines):
        order = []
        for place, stage, word, microbatch in line:
            if stage >= chain.stages or microbatch >= chain.microbatches:
                raise ActionCsvError(f"{place}: there are {chain.stages} stages and {chain.microbatches} microbatches")
            s, holder = chain.place(stage, microbatch)
            if holder != rank:
                raise ActionCsvError(f"{place}: stage {stage} is on rank {holder}")
            kind = _KINDS[word]
            if not graph.has_weight[s, rank] and kind != Kind.F:
                if kind != Kind.BW:
                    raise ActionCsvError(f"{place}: stage {stage} has no weights to train; write B for its backward")
                kind = Kind.B
            order.append(int(kind) * graph.virtual_microbatches + s)
        orders.append(np.array(order, dtype=np.int32))
    schedule = Schedule(tuple(orders), np.zeros((graph.virtual_microbatches, graph.ranks), dtype=np.int8))
    fault = check_complete(graph, schedule)
    if fault is not None:
        raise ActionCsvError(fault)
    return schedule


def read_actions(path: str | Path) -> tuple[OperationGraph, Schedule]:
    """A file's order, with a graph made for it: every forward, input gradient and weight gradient takes a second, and
    there is no memory limit.

    Raises:
        ActionCsvError: ``FILE: place: reason``, also if stages are placed neither in a loop over the ranks nor in a V.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        graph = _graph(list(_lines(text)))
        return graph, parse_actions(text, graph)
    except (OSError, UnicodeDecodeError) as error:
        raise ActionCsvError(f"{path}: can't be read: {error}") from error
    except ActionCsvError as error:
        raise ActionCsvError(f"{path}: {error}") from error


def _lines(text: str) -> Iterator[list[tuple[str, int, str, int]]]:
    """The cells of each line, as (place, stage, action, microbatch)."""
    for rank, cells in enumerate(csv.reader(io.StringIO(text))):
        line = []
        for i, cell in enumerate(cells):
            if not cell.strip():
                continue
            place = f"rank {rank}, action {i} ({cell.strip()[:40]})"
            match = _CELL.fullmatch(cell.strip())
            if match is None:
                raise ActionCsvError(f"{place}: not a stage, one of F, B, I, W and a microbatch, as in 2F0")
            stage, microbatch = int(match[1]), int(match[3])
            if max(stage, microbatch) >= _MOST:
                raise ActionCsvError(f"{place}: stages and microbatches are below {_MOST}")
            line.append((place, stage, match[2], microbatch))
        yield line


def _graph(lines: list[list[tuple[str, int, str, int]]]) -> OperationGraph:
    cells = [cell for line in lines for cell in line]
    if not cells:
        raise ActionCsvError("there is no action")
    ranks, stages = len(lines), 1 + max(stage for _, stage, _, _ in cells)
    microbatches = 1 + max(microbatch for *_, microbatch in cells)
    if stages % ranks:
        raise ActionCsvError(f"{stages} stages on {ranks} ranks: must be a multiple")
    holder = {stage: rank for rank, line in enumerate(lines) for _, stage, word, _ in line if word == "F"}
    segments = stages // ranks
    back = []
    for k in range(segments):
        held = [holder.get(k * ranks + i) for i in range(ranks)]
        if held not in (list(range(ranks)), list(range(ranks))[::-1]):
            raise ActionCsvError(f"stages {k * ranks} to {k * ranks + ranks - 1} are on ranks {held}; DIP places them "
                                 "from the first rank to the last, or back")  # fmt: skip
        back.append(ranks > 1 and held[0] == ranks - 1)
    module = ModalityModule("model", ((1,) * ranks,) * segments, reversed=tuple(back) if any(back) else ())
    second = np.ones((1, microbatches * segments, ranks))
    return OperationGraph(
        ranks=ranks, modules=(module,), units=tuple(Unit(m, "model", m) for m in range(microbatches)), forward=second,
        backward=second, weight=second, fused=2 * second, activation=second, deferred_activation=0 * second,
        transfer=np.zeros(microbatches * segments), static_bytes=np.zeros(ranks), memory_limit=np.full(ranks, np.inf),
    )  # fmt: skip
