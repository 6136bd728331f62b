"""How long a browser takes to show the report of a large run, and how large the file is. Measured.

    scripts/bench report [--ranks 64] [--operations 1000] [--iterations 2000] [--keep FILE]

Writes what a run would write (a plan whose operations take a bit longer than planned, and its iterations), makes the
report and opens it in Chromium. ``drawn`` is from opening the file to the last figure drawn, the browser's start apart.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from dip_megatron.core.lower import make_plan
from dip_megatron.core.simulate import simulate_compiled
from dip_megatron.planner.delivery import DeliveredPlan
from dip_megatron.planner.request import PlannerStatistics
from dip_megatron.report.html import write_report
from dip_megatron.report.iterations import IterationReport
from dip_megatron.report.observed import observed
from dip_megatron.report.recorder import RunRecorder
from dip_megatron.runtime.clock import MeasuredSpan
from dip_megatron.schedulers.greedy import greedy
from tests.browser import DRAWN, opened
from tests.graphs import paper_graph


class Everyone:
    """Rank 0's exchange, where what the other ranks measured is known."""

    rank = 0

    def __init__(self, everyone: list[bytes]):
        self._everyone = everyone

    def gather(self, data: bytes) -> list[bytes]:
        """What all ranks give."""
        return self._everyone

    def broadcast(self, data: bytes | None) -> bytes:
        """Not needed."""
        raise AssertionError("a recorder broadcasts nothing")


def write_run(folder: Path, ranks: int, operations: int, iterations: int) -> int:
    """Traces as a run leaves them; how many operations the last iteration has."""
    each = paper_graph("vlm-s", microbatches=4, ranks=ranks, limited=False, candidates=1).virtual_microbatches / 4
    graph = paper_graph("vlm-s", microbatches=round(operations / 2 / each), ranks=ranks, limited=False, candidates=1)
    plan = make_plan(graph, greedy(graph), lower_bound=0.0)
    plan = replace(plan, predicted=replace(plan.predicted, lower_bound=plan.predicted.iteration_time / 1.02))
    timeline = simulate_compiled(plan.graph, plan.schedule)
    everyone = []
    for rank in range(ranks):
        line = plan.schedule.operations(plan.graph, rank)
        times = zip(line, 1.03 * timeline.start[rank], 1.03 * timeline.end[rank], strict=True)
        spans = [MeasuredSpan(o, graph.units[o.unit].microbatch, float(s), float(e)) for o, s, e in times]
        everyone.append(pickle.dumps((spans, 0.01)))
    recorder = RunRecorder(folder, Everyone(everyone), {"settings": {"schedule": "dynamic"}})
    spans = pickle.loads(everyone[0])[0]
    delivered = DeliveredPlan(0, plan, 1e-5, PlannerStatistics(plans=1))
    report = IterationReport.of(1, delivered, spans, 0.01)
    recorder.record(report, plan, spans)
    first = (folder / "iterations.jsonl").read_text()
    noise = np.random.default_rng(0).normal(1.0, 0.05, iterations)
    with (folder / "iterations.jsonl").open("w") as file:
        for number, factor in enumerate(noise, 1):
            time_field = f'"iteration_seconds": {timeline.iteration_time * 1.03}'
            written = first.replace('"iteration": 1', f'"iteration": {number}')
            file.write(written.replace(time_field, f'"iteration_seconds": {timeline.iteration_time * 1.03 * factor}'))
    recorder.close()
    return sum(len(order) for order in plan.schedule.orders)


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--operations", type=int, default=1000, help="of each rank")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--keep", type=Path, help="write the report here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        count = write_run(Path(folder), arguments.ranks, arguments.operations, arguments.iterations)
        out = arguments.keep or Path(folder) / "report.html"
        began = time.perf_counter()
        write_report(out, observed(Path(folder)))
        made = time.perf_counter() - began
        drawn = []
        with opened(out) as (page, complaints):
            for _ in range(5):
                began = time.perf_counter()
                page.reload()
                page.wait_for_selector(DRAWN)
                drawn.append(time.perf_counter() - began)
            said = complaints
        print(
            f"{arguments.ranks} ranks, {count} operations planned and measured, {arguments.iterations} iterations: "
            f"made in {made:.1f} s, {out.stat().st_size / 1e6:.2f} MB, drawn in {min(drawn):.2f} s (median of 5 "
            f"{sorted(drawn)[2]:.2f} s), {len(said)} complaints of the browser {said or ''}"
        )


if __name__ == "__main__":
    main()
