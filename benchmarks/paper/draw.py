"""One picture for each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

# Colours told apart by readers with any colour vision (Okabe and Ito, 2008).
COLORS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#999999", "#555555", "#F0E442", "#000000")
Points = Sequence[tuple[float, float]]


def bars(path: Path, times: Mapping[str, Mapping[str, float]], schedules: Sequence[str], title: str) -> Path:
    """Groups of bars: each model's schedules by their time over dip's; what doesn't fit has no bar."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axis = figure.subplots()
    width = 0.85 / len(schedules)
    for i, schedule in enumerate(schedules):
        places = [m for m, model in enumerate(times) if schedule in times[model]]
        heights = [times[model][schedule] / times[model]["dip"] for model in times if schedule in times[model]]
        axis.bar(np.array(places) + (i - len(schedules) / 2 + 0.5) * width, heights, width, label=schedule,
                 color=COLORS[i % len(COLORS)])  # fmt: skip
    axis.axhline(1.0, color="#222222", linewidth=0.8)
    axis.set_xticks(range(len(times)), list(times))
    axis.set_ylabel("times dip's")
    return _finish(figure, axis, path, title, columns=5)


def steps(path: Path, rows: Sequence[str], ours: Sequence[float], paper: Sequence[float], title: str) -> Path:
    """Two bars a row: ours and the paper's."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(rows))
    axis.bar(places - 0.2, paper, 0.38, label="paper (quoted)", color=COLORS[6])
    axis.bar(places + 0.2, ours, 0.38, label="ours (simulated)", color=COLORS[0])
    axis.set_xticks(places, rows)
    return _finish(figure, axis, path, title)


def lines(
    path: Path, series: Mapping[str, Points], x: str, y: str, title: str, *, logarithmic: str = "", step: bool = False
) -> Path:
    """Lines through points; ``logarithmic`` names the axes (``x``, ``y``, ``xy``) that are; ``step``: a value holds
    until the next one."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    for i, (name, points) in enumerate(series.items()):
        data = np.array(points, dtype=np.float64).reshape(-1, 2)
        style = {"drawstyle": "steps-post"} if step else {"marker": "o", "markersize": 3.5}
        axis.plot(data[:, 0], data[:, 1], label=name, color=COLORS[i % len(COLORS)], linewidth=1.3, **style)
    if "x" in logarithmic:
        axis.set_xscale("log")
    if "y" in logarithmic:
        axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    return _finish(figure, axis, path, title)


def panels(path: Path, parts: Sequence[tuple[Mapping[str, Points], str, str, str]], title: str) -> Path:
    """Several plots of lines side by side, each (series, x label, y label, logarithmic axes)."""
    figure = Figure(figsize=(6 * len(parts), 4.2), layout="constrained")
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for axis, (series, x, y, logarithmic) in zip(axes, parts, strict=True):
        for i, (name, points) in enumerate(series.items()):
            data = np.array(points, dtype=np.float64).reshape(-1, 2)
            axis.plot(data[:, 0], data[:, 1], marker="o", markersize=3.5, label=name, color=COLORS[i % len(COLORS)])
        axis.set_xscale("log" if "x" in logarithmic else "linear")
        axis.set_yscale("log" if "y" in logarithmic else "linear")
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.legend(fontsize=8, frameon=False)
        _bare(axis)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    return path


def _finish(figure: Figure, axis, path: Path, title: str, columns: int = 2) -> Path:  # type: ignore[no-untyped-def]
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    figure.legend(fontsize=8, frameon=False, ncols=columns, loc="outside lower center")  # never over what is drawn
    _bare(axis)
    figure.savefig(path, dpi=130)
    return path


def _bare(axis) -> None:  # type: ignore[no-untyped-def]
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
