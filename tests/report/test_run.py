"""What is written while training runs: lines, scalars, files; and that a full disk stops nothing."""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dip_megatron.core import Plan
from dip_megatron.core.simulate import simulate
from dip_megatron.planner.delivery import DeliveredPlan
from dip_megatron.planner.request import PlannerStatistics
from dip_megatron.report.iterations import IterationReport
from dip_megatron.report.progress import RunProgress
from dip_megatron.report.recorder import RunRecorder
from dip_megatron.runtime.clock import MeasuredSpan
from tests.planner.makers import Maker
from tests.planner.test_delivery import Shared, ThreadExchange


@dataclass(frozen=True)
class Request:
    request: int


def delivered(request: int) -> DeliveredPlan:
    statistics = PlannerStatistics(plans=request, fallbacks=2, worker_deaths=1, late=3, latency_seconds=0.25)
    return DeliveredPlan(request, Maker().quick(Request(request)).plans[0], 0.5, statistics)


def spans_of_rank(plan: Plan, rank: int, slower: float = 2.0) -> list[MeasuredSpan]:
    """As planned, but ``slower``."""
    timeline = simulate(plan.graph, plan.schedule)
    return [
        MeasuredSpan(key, plan.graph.units[key.unit].microbatch, slower * float(start), slower * float(end))
        for key, start, end in zip(
            plan.schedule.operations(plan.graph, rank), timeline.start[rank], timeline.end[rank], strict=True
        )
    ]


def test_a_line_and_scalars_every_so_many_iterations() -> None:
    shared = Shared(2)
    reports = [IterationReport.of(i + 1, delivered(i), ()) for i in range(5)]

    def one(rank: int) -> tuple[list[str], list[tuple[int, dict[str, float]]]]:
        lines: list[str] = []
        scalars: list[tuple[int, dict[str, float]]] = []
        progress = RunProgress(ThreadExchange(shared, rank), 2, lines.append, lambda s, i: scalars.append((i, s)))
        for report in reports:
            plan = delivered(report.iteration - 1).plan
            progress.record(report, plan, spans_of_rank(plan, rank))
        return lines, scalars

    with ThreadPoolExecutor(2) as pool:
        (lines, scalars), others = pool.map(one, range(2))
    assert others == (lines, scalars)
    assert [i for i, _ in scalars] == [2, 4]
    planned = [delivered(i).plan.predicted for i in range(5)]
    for (_, written), pair in zip(scalars, (planned[0:2], planned[2:4]), strict=True):
        predicted = np.mean([p.iteration_time for p in pair])
        assert written["dip/predicted_seconds"] == pytest.approx(predicted)
        assert written["dip/measured_seconds"] == pytest.approx(2 * predicted)
        assert written["dip/bubble_ratio"] == pytest.approx(
            np.average([p.bubble_ratio for p in pair], weights=[p.iteration_time for p in pair])
        )
        assert written["dip/plan_seconds"] == 0.25
        assert written["dip/stall_seconds"] == 0.5
        assert (written["dip/fallbacks"], written["dip/late_plans"], written["dip/worker_deaths"]) == (2, 3, 1)
    assert len(lines) == 2
    assert lines[0].startswith("[dip] iteration 2: measured ")
    assert "since start: 2 fallbacks, 3 late plans, 1 workers replaced" in lines[0]


class FirstOfTwo:
    """Rank 0's end of an exchange; the other rank has run ``plan``, too."""

    rank = 0
    plan: Plan

    def broadcast(self, data: bytes | None) -> bytes:
        raise AssertionError("nothing is to be broadcast")

    def gather(self, data: bytes) -> list[bytes]:
        return [data, pickle.dumps((spans_of_rank(self.plan, 1), None))]


def record(folder: Path, iterations: int, outside: float | None = None) -> None:
    exchange = FirstOfTwo()
    recorder = RunRecorder(folder, exchange)
    for i in range(iterations):
        here = delivered(i)
        exchange.plan = here.plan
        spans = spans_of_rank(here.plan, 0)
        recorder.record(IterationReport.of(i + 1, here, spans, outside), here.plan, spans)
    recorder.close()


def test_iterations_are_written(tmp_path: Path) -> None:
    record(tmp_path / "trace", 3)
    lines = [json.loads(line) for line in (tmp_path / "trace" / "iterations.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert lines[0]["stall_seconds"] == 0.5
    assert lines[0]["latency_seconds"] == 0.25
    assert lines[0]["fallback"] is True
    assert lines[0]["uncorrected_seconds"] is None
    assert (lines[0]["fallbacks"], lines[0]["late_plans"], lines[0]["worker_deaths"]) == (2, 3, 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_costs_reports_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "iterations.jsonl").symlink_to("/dev/full")
    record(tmp_path, 3)
    assert caplog.text.count("No space left on device") == 1
    assert "training goes on without them" in caplog.text
    assert not (tmp_path / "trace.json").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_disk_that_fills_up_at_the_end_stops_no_exit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "trace.json").symlink_to("/dev/full")
    record(tmp_path, 1)
    assert "training goes on without them" in caplog.text
