from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dip_megatron.core import Kind, Operation, Schedule
from dip_megatron.core.simulate import simulate
from dip_megatron.report.figure import plot_replicas, plot_timeline
from dip_megatron.report.spans import Span, spans_of
from dip_megatron.report.tables import seconds, table
from dip_megatron.report.trace import read_trace, write_trace
from tests.drawn import settings
from tests.graphs import random_graph


def span(rank: int, kind: Kind, unit: int, start: float, end: float, module: str = "text") -> Span:
    return Span(rank, Operation(kind, module, 0, unit, rank), unit, start, end)


TWO_RANKS = [
    span(0, Kind.F, 0, 0.0, 0.1),
    span(1, Kind.F, 0, 0.1, 0.2),
    span(1, Kind.B, 0, 0.2, 0.4),
    span(0, Kind.B, 0, 0.4, 0.5),
    span(1, Kind.W, 0, 0.4, 0.45),
]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_spans_of_a_simulation_hold_every_operation_once(seed: int) -> None:
    graph = random_graph(seed, ranks=1, microbatches=2)
    keys = [graph.operation(Kind.F, s, 0) for s in range(graph.virtual_microbatches)]
    keys += [graph.operation(Kind.BW if graph.has_weight[s, 0] else Kind.B, s, 0)
             for s in reversed(range(graph.virtual_microbatches)) if graph.has_backward[s, 0]]  # fmt: skip
    codes = [int(k.kind) * graph.virtual_microbatches + graph.virtual_microbatch_of(k) for k in keys]
    strategy = np.zeros((graph.virtual_microbatches, 1), dtype=np.int8)
    schedule = Schedule((np.array(codes, dtype=np.int32),), strategy)
    timeline = simulate(graph, schedule)
    spans = spans_of(graph, schedule, timeline)
    assert [s.operation for s in spans] == keys
    assert all(s.microbatch == graph.units[s.operation.unit].microbatch for s in spans)
    assert max(s.end for s in spans) == timeline.iteration_time


def test_a_trace_is_read_back(tmp_path: Path) -> None:
    measured = [span(0, Kind.F, 0, 0.0, 0.3)]
    write_trace(tmp_path / "trace.json", TWO_RANKS, measured, {"moved": 2})
    planned, found = read_trace(tmp_path / "trace.json")
    assert [(s.rank, s.operation, s.microbatch) for s in planned] == [
        (s.rank, s.operation, s.microbatch) for s in TWO_RANKS
    ]
    assert [s.end for s in planned] == pytest.approx([s.end for s in TWO_RANKS])
    assert found == measured
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["args"] for e in events if e["name"] == "exchange"] == [{"moved": 2}]
    (tmp_path / "trace.json").write_text('{"traceEvents": [{"ph": "X"}]}')
    with pytest.raises(ValueError, match="not a trace of a run"):
        read_trace(tmp_path / "trace.json")


def test_replicas_are_drawn_below_one_another(tmp_path: Path) -> None:
    later = [span(s.rank, s.operation.kind, 3, s.start + 1.0, s.end + 1.0) for s in TWO_RANKS]
    plot_replicas(tmp_path / "two.svg", {"replica 0": TWO_RANKS, "replica 1": later}, title="a run")
    text = (tmp_path / "two.svg").read_text()
    assert text.index("replica 0: 500 ms") < text.index("replica 1: 1500 ms")
    assert text.count("rank 1") == 2


def test_a_trace_has_a_process_per_rank_and_both_lanes(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", TWO_RANKS, [span(0, Kind.F, 0, 0.0, 0.3)])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    assert [(e["pid"], e["tid"]) for e in slices] == [(0, 0), (1, 0), (1, 0), (0, 0), (1, 0), (0, 1)]
    assert slices[2]["ts"] == pytest.approx(200_000)
    assert slices[2]["dur"] == pytest.approx(200_000)
    assert Operation.parse(slices[2]["args"]["stage"]) == TWO_RANKS[2].operation
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(0, 0): "planned", (0, 1): "measured", (1, 0): "planned", (1, 1): "measured"}


def test_arrows_join_the_ranks_of_a_unit(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", TWO_RANKS, [])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    sent = {e["id"]: e for e in events if e["ph"] == "s"}
    received = {e["id"]: e for e in events if e["ph"] == "f"}
    assert sent.keys() == received.keys()
    assert sorted((sent[i]["name"], sent[i]["pid"], received[i]["pid"]) for i in sent) == [
        ("activations", 0, 1),
        ("gradients", 1, 0),
    ]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_drawn(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"timeline.{suffix}"
    plot_timeline(path, TWO_RANKS, TWO_RANKS, lower_bound=0.45, title="an iteration")
    content = path.read_bytes()
    if suffix == "png":
        assert content.startswith(b"\x89PNG")
    else:
        text = content.decode()
        for word in (
            "an iteration",
            "planned: 500 ms",
            "measured",
            "rank 1",
            "bubbles 45.0%",
            "1.111 x",
            "text forward",
        ):
            assert word in text


def test_a_picture_of_one_timeline_alone(tmp_path: Path) -> None:
    plot_timeline(tmp_path / "one.svg", TWO_RANKS, [])
    text = (tmp_path / "one.svg").read_text()
    assert "planned" in text
    assert "measured" not in text
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_timeline(tmp_path / "none.svg", [], [])


def test_tables_show_what_is_known() -> None:
    console = Console(width=100, record=True)
    columns = ("schedule", "seconds", "note")
    console.print(table("Times", columns, [("1F1B", {"seconds": 1.23456, "note": "x"}), ("DIP", {"seconds": None})]))
    text = console.export_text()
    assert "1.235" in text
    assert "–" in text
    assert "Times" in text


@pytest.mark.parametrize(("value", "text"), [(1.5, "1.500 s"), (0.0123, "12.3 ms"), (45e-6, "45 µs"), (0.0, "0 µs")])
def test_seconds_have_fitting_units(value: float, text: str) -> None:
    assert seconds(value) == text
