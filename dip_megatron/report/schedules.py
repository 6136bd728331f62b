"""The tables and JSON entries of ``dip plan`` and ``dip compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import numpy as np

from ..planner.planning_result import PlanningResult
from ..planner.replicated import Outcome

Entry = dict[str, Any]
FIELDS = (
    "iteration_time", "lower_bound", "bubble_ratio", "peak_bytes", "fits", "recompute_fraction", "plan_seconds",
)  # fmt: skip


def entry(planned: PlanningResult) -> Entry:
    """One schedule in one iteration: seconds, shares, and the bytes of the fullest rank."""
    return {
        "iteration_time": planned.iteration_time,
        "lower_bound": planned.lower_bound,
        "bubble_ratio": planned.bubble_ratio,
        "peak_bytes": max(planned.peak_bytes),
        "fits": planned.fits,
        "recompute_fraction": planned.recompute_fraction,
        "plan_seconds": planned.plan_seconds,
    }


def missing_entry() -> Entry:
    """A schedule without any plan for the batch: it fits in no way, or can't run it."""
    return dict.fromkeys(FIELDS) | {"fits": False}


def mean_entries(iterations: Sequence[Mapping[str, Entry]]) -> dict[str, Entry]:
    """Per schedule the mean of every number (None if it has none in some iteration); ``fits`` if it always does."""
    means = {}
    for name in iterations[0]:
        means[name] = {field: _mean([i[name][field] for i in iterations]) for field in FIELDS}
        means[name]["fits"] = all(i[name]["fits"] for i in iterations)
    return means


def _mean(values: Sequence[Any]) -> float | None:
    return None if any(v is None for v in values) else float(np.mean(values))


def compare_table(mean: Mapping[str, Entry], reference: str = "dip") -> str:
    """The means as text, fastest that fits first; ``x`` is the time over that of ``reference``."""
    base = mean.get(reference, {}).get("iteration_time")
    rows = []
    for name, e in sorted(mean.items(), key=lambda item: (not item[1]["fits"], item[1]["iteration_time"] or np.inf)):
        if e["iteration_time"] is None:
            rows.append([name, "-", "-", "-", "-", "-", "no plan", "-", "-"])
            continue
        rows.append(
            [
                name,
                f"{e['iteration_time']:.4f}",
                f"{e['iteration_time'] / base:.3f}" if base else "-",
                f"{e['iteration_time'] / e['lower_bound']:.3f}",
                f"{e['bubble_ratio']:.1%}",
                f"{e['peak_bytes'] / 1e9:.1f}",
                "yes" if e["fits"] else "NO",
                f"{e['recompute_fraction']:.1%}",
                f"{e['plan_seconds']:.3f}",
            ]
        )
    header = ["schedule", "seconds", f"x {reference}", "over bound", "bubble", "peak GB", "fits", "recompute", "plan s"]
    return text_table(header, rows)


def replicas_entry(iterations: Sequence[tuple[Outcome, Outcome]]) -> Entry:
    """One schedule of several replicas: means over the iterations of their slowest one's seconds and of those over the
    mean, before and after an exchange. ``gain``: the job's time before over its time after."""
    before, after = zip(*iterations, strict=True)
    slowest = [float(np.mean([o.slowest for o in line])) for line in (before, after)]
    return {
        "slowest_before": slowest[0], "slowest_after": slowest[1],
        "spread_before": float(np.mean([o.spread for o in before])),
        "spread_after": float(np.mean([o.spread for o in after])),
        "moved": float(np.mean([o.moved for o in after])), "gain": slowest[0] / slowest[1],
    }  # fmt: skip


def replicas_table(entries: Mapping[str, Entry | None]) -> str:
    """As text, fastest after the exchange first."""
    rows = []
    for name, e in sorted(entries.items(), key=lambda item: np.inf if item[1] is None else item[1]["slowest_after"]):
        if e is None:
            rows.append([name, "-", "-", "-", "-", "no plan", "-"])
            continue
        rows.append([
            name, f"{e['slowest_before']:.4f}", f"{e['spread_before']:.3f}", f"{e['slowest_after']:.4f}",
            f"{e['spread_after']:.3f}", f"{e['moved']:.0%}", f"{e['gain']:.3f}",
        ])  # fmt: skip
    header = ["schedule", "slowest s", "over mean", "after: slowest s", "over mean", "moved", "gain"]
    return text_table(header, rows)


def plan_table(found: Sequence[PlanningResult]) -> str:
    """One line per iteration."""
    rows = [
        [
            str(i),
            f"{p.iteration_time:.4f}",
            f"{p.lower_bound:.4f}",
            f"{p.iteration_time / p.lower_bound:.3f}",
            f"{p.bubble_ratio:.1%}",
            f"{max(p.peak_bytes) / 1e9:.1f}",
            f"{p.recompute_fraction:.1%}",
            f"{p.plan_seconds:.3f}",
        ]
        for i, p in enumerate(found)
    ]
    return text_table(["iteration", "seconds", "bound", "over bound", "bubble", "peak GB", "recompute", "plan s"], rows)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table of any width, the first column left, the others right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out = StringIO()
    Console(file=out, width=200).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())
