"""A picture of one iteration: the plan and what happened, rank by rank, on one clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..core import Kind
from ..core.simulate import idle_share
from .colors import KIND_NAMES, module_colors
from .spans import Span

_IDLE = "#d6d6d6"
_WIDTH = 14.0  # inches
_ROW = 0.42  # inches per rank


def plot_timeline(
    path: Path | str,
    planned: Sequence[Span],
    measured: Sequence[Span],
    *,
    lower_bound: float | None = None,
    title: str = "",
) -> None:
    """Draw both timelines of one iteration into ``path`` (.svg, .png or .pdf).

    One panel each, a row per rank; colour says module, shade says forward or backward, the number is the microbatch,
    grey is idle time. ``lower_bound`` (seconds) is drawn as a line. Either timeline may be empty. Raises ValueError if
    both are, OSError if ``path`` can't be written.
    """
    panels = [(name, spans) for name, spans in (("planned", planned), ("measured", measured)) if spans]
    _plot(path, panels, lower_bound, title)


def plot_replicas(path: Path | str, replicas: Mapping[str, Sequence[Span]], *, title: str = "") -> None:
    """Draw one iteration of several replicas, by name, below one another; each on its own clock, which begins with the
    iteration. See :func:`plot_timeline`."""
    _plot(path, [(name, spans) for name, spans in replicas.items() if spans], None, title)


def _plot(
    path: Path | str, panels: Sequence[tuple[str, Sequence[Span]]], lower_bound: float | None, title: str
) -> None:
    if not panels:
        raise ValueError("nothing to draw: neither planned nor measured operations")
    everything = [span for _, spans in panels for span in spans]
    ranks = sorted({span.rank for span in everything})
    colors = module_colors((s.operation.module, s.operation.kind) for s in everything)
    longest = max(span.end for span in everything)
    unit, scale = ("ms", 1e3) if longest < 10.0 else ("s", 1.0)

    height = len(panels) * (len(ranks) * _ROW + 0.55) + 1.1
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, spans) in zip(axes, panels, strict=True):
        _draw_panel(axis, name, spans, ranks, colors, scale, longest)
        if lower_bound is not None and lower_bound > 0:
            axis.axvline(lower_bound * scale, color="#222222", linewidth=1.0, linestyle=(0, (4, 3)))
        axis.set_title(_headline(name, spans, len(ranks), lower_bound, scale, unit), loc="left", fontsize=10)
    axes[-1].set_xlabel(f"time since the start of the iteration ({unit}); numbers are microbatches", fontsize=9)
    figure.legend(
        handles=_legend(colors, lower_bound), loc="outside lower center", ncols=8, fontsize=8.5, frameon=False,
        handlelength=1.4,
    )  # fmt: skip
    if title:
        figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    with matplotlib.rc_context({"svg.hashsalt": "dip", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=150)


def _draw_panel(
    axis: Any,
    name: str,
    spans: Sequence[Span],
    ranks: Sequence[int],
    colors: dict[tuple[str, Kind], tuple[float, float, float]],
    scale: float,
    longest: float,
) -> None:
    end = max(span.end for span in spans)
    row = {rank: place for place, rank in enumerate(ranks)}
    axis.barh(list(row.values()), [end * scale] * len(row), height=0.84, color=_IDLE, linewidth=0)
    for kind in Kind:
        some = [span for span in spans if span.operation.kind == kind]
        if not some:
            continue
        axis.barh(
            [row[s.rank] for s in some],
            [(s.end - s.start) * scale for s in some],
            left=[s.start * scale for s in some],
            height=0.84,
            color=[colors[s.operation.module, kind] for s in some],
            edgecolor="white",
            linewidth=0.3,
        )
    points_per_second = (_WIDTH - 1.2) * 72 / longest
    for span in spans:
        text = str(span.microbatch)
        if (span.end - span.start) * points_per_second > 4.2 * len(text) + 2:
            axis.text(
                (span.start + span.end) / 2 * scale, row[span.rank], text, ha="center", va="center_baseline",
                fontsize=6.5, color="white" if span.operation.kind in (Kind.B, Kind.BW) else "#222222", clip_on=True,
            )  # fmt: skip
    axis.set_yticks(list(row.values()), [f"rank {rank}" for rank in ranks], fontsize=8.5)
    axis.set_ylim(len(ranks) - 0.5, -0.5)
    axis.set_xlim(0, longest * scale * 1.005)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8.5)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _headline(name: str, spans: Sequence[Span], ranks: int, lower_bound: float | None, scale: float, unit: str) -> str:
    end = max(span.end for span in spans)
    idle = idle_share(sum(span.end - span.start for span in spans), end * ranks)
    parts = [f"{name}: {end * scale:.4g} {unit}", f"bubbles {idle:.1%}"]
    if lower_bound is not None and lower_bound > 0:
        parts.insert(1, f"{end / lower_bound:.3f} x the lower bound ({lower_bound * scale:.4g} {unit})")
    return "  ·  ".join(parts)


def _legend(colors: dict[tuple[str, Kind], tuple[float, float, float]], lower_bound: float | None) -> list[Any]:
    handles: list[Any] = [
        Patch(color=color, label=f"{module} {KIND_NAMES[kind]}") for (module, kind), color in colors.items()
    ]
    handles.append(Patch(color=_IDLE, label="idle"))
    if lower_bound is not None and lower_bound > 0:
        from matplotlib.lines import Line2D

        handles.append(Line2D([], [], color="#222222", linewidth=1.0, linestyle=(0, (4, 3)), label="lower bound"))
    return handles
