"""Plan files: JSON lines, one iteration's plan a line, self-contained so that anyone can check it again.

``docs/plan-format.md`` is the reference, ``plan.schema.json`` beside this module the JSON schema. Writing what was read
gives the same line, character by character (lines of version 1 are read, and written as version 2).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from .actions import Compute, parse_action
from .codes import encode
from .experts import Coupled, ExpertLayers, ExpertLayersError
from .faults import reason
from .format import VERSION, OperationBytes, OperationTimes, PlanRecord, UnitRecord, upgraded
from .graph import Floats, GraphError, OperationGraph
from .json_lines import load_line
from .modules import ModalityModule, Unit
from .operations import Operation
from .order import Schedule
from .plan import Payload, Plan, Predicted, SearchStatistics, TensorSpec
from .plan_set import PlanSet
from .versions import is_version

Row = TypeVar("Row", OperationTimes, OperationBytes)


class PlanFileError(ValueError):
    """A malformed plan file; the message is ``FILE:LINE: place: reason`` (``place: reason`` from a single line)."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


def read_plans(path: str | Path) -> Iterator[Plan]:
    """The plans of a file, one after the other; blank lines are skipped.

    Reads strictly (no field missing, unknown or of another type) but runs no plan: :func:`verify` does that. Raises
    PlanFileError at the first fault.
    """
    found = False
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    plan = parse_plan(line)
                except PlanFileError as error:
                    raise PlanFileError(f"{path}:{number}: {error}") from error
                found = True
                yield plan
    except OSError as error:
        raise PlanFileError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PlanFileError(f"{path}:1: file: not UTF-8 at byte {error.start}") from error
    if not found:
        raise PlanFileError(f"{path}:1: file: holds no plan")


def plan_sets_of(plans: Iterable[Plan], path: str | Path) -> Iterator[PlanSet]:
    """The plan sets that the plans of the file ``path`` make up, as the plans are read.

    Plans of coupled replicas stand on consecutive lines, replica by replica; any other plan is a set of its own.

    Raises:
        PlanFileError: a line is malformed, or a set incomplete.
    """
    started: list[Plan] = []
    for number, plan in enumerate(plans, start=1):
        if plan.coupled is None:
            _check_complete(started, path, number)
            yield PlanSet((plan,))
            continue
        if plan.coupled.replica != len(started) or (
            started and started[0].coupled is not None and plan.coupled.replicas != started[0].coupled.replicas
        ):
            raise PlanFileError(
                f"{path}: plan {number}: coupled: replica {plan.coupled.replica} of {plan.coupled.replicas} stands "
                f"where replica {len(started)} of its set belongs"
            )
        started.append(plan)
        if len(started) == plan.coupled.replicas:
            yield PlanSet(tuple(started))
            started = []
    _check_complete(started, path, None)


def _check_complete(started: list[Plan], path: str | Path, number: int | None) -> None:
    if not started or started[0].coupled is None:
        return
    where = "at its end" if number is None else f"before plan {number}"
    raise PlanFileError(
        f"{path}: coupled: {len(started)} plans of a set of {started[0].coupled.replicas} {where}; the others are "
        "missing"
    )


def write_plans(path: str | Path, plans: Iterable[Plan]) -> None:
    """Write plans, one a line. Raises OSError if the file can't be written."""
    with Path(path).open("w", encoding="utf-8") as file:
        for plan in plans:
            file.write(format_plan(plan) + "\n")


def format_plan(plan: Plan) -> str:
    """One line of a plan file, without the line's end."""
    graph = plan.graph
    rows = [
        {"module": unit.module, "segment": segment, "unit": unit.id}
        for unit in graph.units
        for segment in range(graph.module(unit.module).segments)
    ]
    times = {"F": graph.forward, "B": graph.backward, "W": graph.weight, "BW": graph.fused}
    held = {"activation": graph.activation, "deferred_activation": graph.deferred_activation}
    record = {
        "version": VERSION,
        "schedule": plan.name,
        "ranks": graph.ranks,
        "modules": [
            {
                "name": m.name, "segments": m.segments, "layers": m.layers, "trainable": m.trainable,
                "upstream": m.upstream, "reversed": m.reversed, **({"replicated": True} if m.replicated else {}),
            }
            for m in graph.modules
        ],
        "units": [
            {
                "id": u.id, "module": u.module, "microbatch": u.microbatch, "instances": [u.first, u.count],
                "downstream": u.downstream, **({} if u.rank is None else {"rank": u.rank}),
            }
            for u in graph.units
        ],
        "durations": [row | {k: a[0, s].tolist() for k, a in times.items()} for s, row in enumerate(rows)],
        "activation_bytes": [row | {k: a[0, s].tolist() for k, a in held.items()} for s, row in enumerate(rows)],
        "transfer": graph.transfer.tolist(),
        **({"overhead": list(graph.overhead)} if graph.overhead else {}),
        "memory_limit": [limit if np.isfinite(limit) else None for limit in graph.memory_limit.tolist()],
        "static_bytes": graph.static_bytes.tolist(),
        "payloads": [
            {
                **dict(zip(("source", "target", "rank"), key, strict=False)),
                "tensors": [
                    {"name": t.name, "shape": t.shape, "dtype": t.dtype, "differentiable": t.differentiable}
                    for t in plan.payloads[key]
                ],
            }
            for key in sorted(plan.payloads)
        ],
        "actions": [[str(action) for action in line] for line in plan.actions],
        "predicted": {
            "iteration_time": plan.predicted.iteration_time,
            "lower_bound": plan.predicted.lower_bound,
            "bubble_ratio": plan.predicted.bubble_ratio,
            "peak_bytes": list(plan.predicted.peak_bytes),
        },
        "search": {
            "seconds": plan.search.seconds, "evaluations": plan.search.evaluations,
            "workers": plan.search.workers, "seed": plan.search.seed,
        },
    }  # fmt: skip
    if plan.coupled is not None:
        experts = plan.coupled.experts
        record["coupled"] = {
            "replica": plan.coupled.replica, "replicas": plan.coupled.replicas, "experts": dict(experts.modules),
            "repeating": sorted(experts.repeating),
        }  # fmt: skip
    return json.dumps(record, allow_nan=False)


def parse_plan(line: str) -> Plan:
    """Inverse of :func:`format_plan`. Raises PlanFileError ``place: reason``."""
    record = _validated(load_line(line, PlanFileError))
    modules = tuple(
        ModalityModule(
            m.name,
            tuple(map(tuple, m.layers)),
            tuple(m.upstream),
            tuple(map(tuple, m.trainable)),
            tuple(m.reversed),
            m.replicated,
        )
        for m in record.modules
    )
    for i, m in enumerate(record.modules):
        if len(m.layers) != m.segments:
            raise PlanFileError(f"modules[{i}].layers: {len(m.layers)} segments, the module says {m.segments}")
    units = tuple(_unit(i, u) for i, u in enumerate(record.units))
    times, held = (
        _rows(record, "durations", record.durations),
        _rows(record, "activation_bytes", record.activation_bytes),
    )
    for name in ("memory_limit", "static_bytes"):
        _length(name, getattr(record, name), record.ranks, "ranks")
    _length("predicted.peak_bytes", record.predicted.peak_bytes, record.ranks, "ranks")
    _length("actions", record.actions, record.ranks, "ranks")
    _length("transfer", record.transfer, len(times), "entries in durations")
    if record.overhead is not None:
        _length("overhead", record.overhead, record.ranks, "ranks")
    limit = [np.inf if b is None else b for b in record.memory_limit]
    try:
        graph = OperationGraph(
            ranks=record.ranks,
            modules=modules,
            units=units,
            forward=_array(times, "F"),
            backward=_array(times, "B"),
            weight=_array(times, "W"),
            fused=_array(times, "BW"),
            activation=_array(held, "activation"),
            deferred_activation=_array(held, "deferred_activation"),
            transfer=np.array(record.transfer, dtype=np.float64),
            static_bytes=np.array(record.static_bytes, dtype=np.float64),
            memory_limit=np.array(limit, dtype=np.float64),
            overhead=tuple(record.overhead or ()),
        )
    except GraphError as error:
        raise PlanFileError(f"modules, units: {error}") from error
    actions = tuple(
        tuple(_action(f"actions[{rank}][{i}]", text) for i, text in enumerate(line))
        for rank, line in enumerate(record.actions)
    )
    graph = _with_strategies(graph, actions)
    schedule = _schedule(graph, actions)
    try:
        codes = encode(graph, actions)
    except GraphError as error:
        raise PlanFileError(f"actions: {error}") from error
    return Plan(
        graph=graph,
        schedule=schedule,
        codes=codes,
        predicted=Predicted(
            record.predicted.iteration_time,
            record.predicted.lower_bound,
            record.predicted.bubble_ratio,
            tuple(record.predicted.peak_bytes),
        ),
        name=record.schedule,
        payloads=_payloads(record),
        search=SearchStatistics(
            record.search.seconds, record.search.evaluations, record.search.workers, record.search.seed
        ),
        coupled=_coupled(record, modules),
    )


def _coupled(record: PlanRecord, modules: Sequence[ModalityModule]) -> Coupled | None:
    if record.coupled is None:
        return None
    replica, replicas = record.coupled.replica, record.coupled.replicas
    if replica >= replicas:
        raise PlanFileError(f"coupled.replica: {replica} of {replicas} replicas; they are numbered from 0")
    experts = ExpertLayers.of(record.coupled.experts, record.coupled.repeating)
    try:
        experts.check(modules)
    except ExpertLayersError as error:
        raise PlanFileError(f"coupled.experts: {error}") from error
    return Coupled(replica, replicas, experts)


def _validated(data: Any) -> PlanRecord:
    if not isinstance(data, dict):
        raise PlanFileError(f"line: expected an object, got {type(data).__name__}")
    if is_version(data, 1):
        data = upgraded(data)
    elif "version" in data and data["version"] != VERSION:
        raise PlanFileError(
            f"version: {json.dumps(data['version'])} is not supported, only 1 and {VERSION}; plan again"
        )
    try:
        return PlanRecord.model_validate(data)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        raise PlanFileError(f"{_place(fault['loc'])}: {reason(fault, PlanRecord)}") from error


def _place(location: Sequence[str | int]) -> str:
    """``units[3].downstream[0]`` for pydantic's location."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _unit(place: int, record: UnitRecord) -> Unit:
    if record.id != place:
        raise PlanFileError(f"units[{place}].id: {record.id} stands at place {place}; ids are positions")
    first, count = record.instances
    return Unit(record.id, record.module, record.microbatch, first, count, tuple(record.downstream), record.rank)


def _length(place: str, values: Sequence[object], expected: int, of: str) -> None:
    if len(values) != expected:
        raise PlanFileError(f"{place}: {len(values)} entries for {expected} {of}")


def _rows(record: PlanRecord, place: str, rows: list[Row]) -> list[Row]:
    """The rows, checked to be those of the units, in order, with an entry per rank."""
    segments = {m.name: m.segments for m in record.modules}
    expected = []
    for i, unit in enumerate(record.units):
        if unit.module not in segments:
            raise PlanFileError(f"units[{i}].module: no module is called {unit.module!r}")
        expected += [(unit.module, k, unit.id) for k in range(segments[unit.module])]
    _length(place, rows, len(expected), "rows (units times segments)")
    for s, (row, key) in enumerate(zip(rows, expected, strict=True)):
        if (row.module, row.segment, row.unit) != key:
            raise PlanFileError(f"{place}[{s}]: expected module {key[0]}, segment {key[1]}, unit {key[2]} here")
        for name, values in row:
            if isinstance(values, list):
                _length(f"{place}[{s}].{name}", values, record.ranks, "ranks")
    return rows


def _array(rows: Sequence[OperationTimes | OperationBytes], name: str) -> Floats:
    return np.array([[getattr(row, name) for row in rows]], dtype=np.float64)


def _action(place: str, text: str) -> Any:
    try:
        return parse_action(text)
    except ValueError as error:
        raise PlanFileError(f"{place}: {error}") from error


def _virtual_microbatch_of(graph: OperationGraph, rank: int, place: str, operation: Operation) -> int:
    if operation.rank != rank:
        raise PlanFileError(f"{place}: {operation} is rank {operation.rank}'s, the list is rank {rank}'s")
    try:
        return graph.virtual_microbatch_of(operation)
    except GraphError as error:
        raise PlanFileError(f"{place}: {error}") from error


def _schedule(graph: OperationGraph, actions: Sequence[Sequence[Any]]) -> Schedule:
    """The order of operations that the compute actions spell out."""
    orders = []
    for rank, line in enumerate(actions):
        order = []
        for i, action in enumerate(line):
            if isinstance(action, Compute):
                s = _virtual_microbatch_of(graph, rank, f"actions[{rank}][{i}]", action.operation)
                order.append(int(action.operation.kind) * graph.virtual_microbatches + s)
        orders.append(np.array(order, dtype=np.int32))
    return Schedule(tuple(orders), np.zeros((graph.virtual_microbatches, graph.ranks), dtype=np.int8))


def _with_strategies(graph: OperationGraph, actions: Sequence[Sequence[Any]]) -> OperationGraph:
    """The graph with the memory strategies that the actions name; one stage has one strategy."""
    names: dict[tuple[int, int], str] = {}
    for rank, line in enumerate(actions):
        for i, action in enumerate(line):
            if isinstance(action, Compute):
                place = f"actions[{rank}][{i}]"
                s = _virtual_microbatch_of(graph, rank, place, action.operation)
                known = names.setdefault((s, rank), action.strategy)
                if known != action.strategy:
                    raise PlanFileError(f"{place}: strategy {action.strategy!r} differs from {known!r} before")
    strategies = tuple(
        tuple((names.get((s, p), "none"),) for p in range(graph.ranks)) for s in range(graph.virtual_microbatches)
    )
    return replace(graph, strategies=strategies)


def _payloads(record: PlanRecord) -> dict[tuple[int, ...], Payload]:
    payloads: dict[tuple[int, ...], Payload] = {}
    for i, payload in enumerate(record.payloads):
        pair = (payload.source, payload.target, *(() if payload.rank is None else (payload.rank,)))
        if pair in payloads:
            raise PlanFileError(f"payloads[{i}]: {pair[0]} to {pair[1]} comes twice")
        payloads[pair] = tuple(TensorSpec(t.name, tuple(t.shape), t.dtype, t.differentiable) for t in payload.tensors)
    return payloads
