"""The tables and JSON entries of ``dip plan`` and ``dip compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import numpy as np

from ..planner.planned import Planned

Entry = dict[str, Any]
FIELDS = (
    "iteration_time", "lower_bound", "bubble_ratio", "peak_bytes", "fits", "recompute_fraction", "plan_seconds",
)  # fmt: skip


def entry(planned: Planned) -> Entry:
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


def plan_table(found: Sequence[Planned]) -> str:
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
