"""Timelines for https://ui.perfetto.dev and chrome://tracing, in the Trace Event format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..core import Kind, Operation
from .spans import Span

_LANES = ("planned", "measured")
_MICROSECONDS = 1e6


def write_trace(
    path: Path | str, planned: Sequence[Span], measured: Sequence[Span], exchange: dict[str, Any] | None = None
) -> None:
    """Write both timelines of one iteration: a process per rank, in it a lane for the plan and one for what happened.

    Arrows follow each unit from rank to rank, forward and backward. Either timeline may be empty. ``exchange``: what
    replicas exchanged before it, shown as an event at its start. Raises OSError when ``path`` can't be written.
    """
    events: list[dict[str, Any]] = []
    if exchange is not None:
        events.append({"name": "exchange", "ph": "i", "s": "g", "pid": 0, "tid": 0, "ts": 0.0, "args": exchange})
    for rank in sorted({s.rank for s in (*planned, *measured)}):
        events.append(_name("process_name", rank, 0, f"rank {rank}"))
        events.append({"name": "process_sort_index", "ph": "M", "pid": rank, "tid": 0, "args": {"sort_index": rank}})
        events += [_name("thread_name", rank, lane, name) for lane, name in enumerate(_LANES)]
    for lane, spans in enumerate((planned, measured)):
        events += [_operation(span, lane) for span in spans]
        events += _arrows(spans, lane)
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":")))


def read_trace(path: Path | str) -> tuple[list[Span], list[Span]]:
    """The operations of a file of :func:`write_trace`, as planned and as measured. Raises ValueError, OSError."""
    lanes: tuple[list[Span], list[Span]] = ([], [])
    try:
        for event in json.loads(Path(path).read_text())["traceEvents"]:
            if event["ph"] != "X":
                continue
            start, args = event["ts"] / _MICROSECONDS, event["args"]
            lanes[event["tid"]].append(
                Span(event["pid"], Operation.parse(args["stage"]), args["microbatch"], start,
                     start + event["dur"] / _MICROSECONDS)
            )  # fmt: skip
    except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: not a trace of a run ({type(error).__name__}: {error})") from error
    return lanes


def _name(what: str, rank: int, lane: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": rank, "tid": lane, "args": {"name": name}}


def _operation(span: Span, lane: int) -> dict[str, Any]:
    operation = span.operation
    return {
        "name": f"{operation.kind.name} {operation.module} {span.microbatch}",
        "cat": f"{operation.module},{operation.kind.name}",
        "ph": "X",
        "pid": span.rank,
        "tid": lane,
        "ts": span.start * _MICROSECONDS,
        "dur": (span.end - span.start) * _MICROSECONDS,
        "args": {
            "stage": str(operation),
            "microbatch": span.microbatch,
            "segment": operation.segment,
            "unit": operation.unit,
        },
    }


def _arrows(spans: Iterable[Span], lane: int) -> list[dict[str, Any]]:
    """Flow events: a unit's forwards in the order they ran, and its backwards (weight gradients go nowhere)."""
    chains: dict[tuple[bool, str, int], list[Span]] = {}
    for span in spans:
        if span.operation.kind != Kind.W:
            chains.setdefault((span.operation.kind == Kind.F, span.operation.module, span.operation.unit), []).append(
                span
            )
    events: list[dict[str, Any]] = []
    for (forward, module, unit), chain in sorted(chains.items()):
        chain.sort(key=lambda s: s.start)
        for step, (sender, receiver) in enumerate(pairwise(chain)):
            flow = {
                "name": "activations" if forward else "gradients",
                "cat": "message",
                "id": f"{_LANES[lane]}:{module}:{unit}:{'F' if forward else 'B'}:{step}",
                "tid": lane,
            }
            # An arrow leaves at the end of an operation, where its slice still counts as enclosing.
            events.append(flow | {"ph": "s", "pid": sender.rank, "ts": sender.end * _MICROSECONDS - 1e-3})
            events.append(flow | {"ph": "f", "bp": "e", "pid": receiver.rank, "ts": receiver.start * _MICROSECONDS})
    return events
