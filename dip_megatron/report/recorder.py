"""Writes what a run did: a line per iteration, and trace and picture of the last one."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ..core import Plan
from ..core.files import format_plan
from ..core.protocols import Exchange
from ..core.simulate import idle_share, simulate
from ..runtime.clock import MeasuredSpan
from .breakdown import as_dicts, measured_breakdown, planned_breakdown
from .iterations import IterationReport
from .spans import Span, spans_of

logger = logging.getLogger(__name__)

LINES = "iterations.jsonl"
LAST_PLAN = "last_plan.jsonl"
TRACE = "trace.json"
ABOUT = "run.json"


class RunRecorder:
    """Gathers every rank's measured operations on rank 0, which writes files. A full disk costs no training.

    ``about``: settings and versions of the run, for ``run.json``.
    """

    def __init__(self, folder: Path, exchange: Exchange, about: Mapping[str, Mapping[str, object]] | None = None):
        self._folder = folder
        self._exchange = exchange
        self._last: tuple[Plan, list[Span], IterationReport] | None = None
        self._broken = False
        if about and exchange.rank == 0:
            self._write(lambda: self._put(ABOUT, json.dumps(about, indent=1, default=str) + "\n"))

    def record(self, report: IterationReport, plan: Plan, spans: Sequence[MeasuredSpan]) -> None:
        """Call on all ranks after each iteration."""
        gathered = self._exchange.gather(pickle.dumps((list(spans), report.outside_seconds)))
        if self._exchange.rank != 0:
            return
        everyone, outside = zip(*map(pickle.loads, gathered), strict=True)
        measured = [
            Span(rank, s.operation, s.microbatch, s.start, s.end) for rank, line in enumerate(everyone) for s in line
        ]
        self._last = (plan, measured, report)
        seconds = max((s.end for s in measured), default=0.0)
        busy = sum(s.end - s.start for s in measured)
        line = report.as_dict() | {
            "iteration_seconds": seconds,
            "bubble_ratio_measured": idle_share(busy, seconds * plan.graph.ranks),
            "breakdown": as_dicts(planned_breakdown(plan), measured_breakdown(plan, everyone, outside)),
        }
        self._write(lambda: self._append(line))

    def close(self) -> None:
        """Write trace and picture of the last iteration."""
        if self._last is None or self._exchange.rank != 0:
            return
        plan, measured, report = self._last
        planned = spans_of(plan.graph, plan.schedule, simulate(plan.graph, plan.schedule))

        def draw() -> None:
            from .trace import write_trace

            exchange = None if report.exchange is None else asdict(report.exchange)
            write_trace(self._folder / TRACE, planned, measured, exchange)
            self._put(LAST_PLAN, format_plan(plan) + "\n")
            try:
                from .figure import plot_timeline
            except ImportError:
                logger.warning("no timeline.png: matplotlib is not installed (pip install 'dip_megatron[viz]')")
                return
            plot_timeline(self._folder / "timeline.png", planned, measured)

        self._write(draw)

    def _put(self, name: str, text: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / name).write_text(text, encoding="utf-8")

    def _append(self, line: dict[str, object]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / LINES).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _write(self, action: object) -> None:
        if self._broken:
            return
        try:
            action()  # type: ignore[operator]
        except OSError as error:
            self._broken = True
            logger.warning("can't write reports to %s (%s); training goes on without them", self._folder, error)
