"""Charts of a report: idle time by cause, memory, iterations, prediction against measurement, replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, HoverTool
from bokeh.palettes import Viridis256
from bokeh.plotting import figure

from ...core.simulate import memory_over_time
from ..causes import CAUSES, IdleCauses, idle_causes
from ..observed import Observed

_CAUSE_COLORS = ("#56B4E9", "#E69F00", "#D55E00", "#CC79A7", "#666666")
_LINES = {
    "measured": ("iteration_seconds", "#D55E00"),
    "predicted": ("predicted_seconds", "#0072B2"),
    "lower bound": ("lower_bound", "#666666"),
}
_TOOLS = "xpan,xwheel_zoom,xbox_zoom,reset,save"
_HEIGHT = 260
DOTS = 3000  # of a scatter at most, evenly taken: more say nothing new and take the browser long


def causes(found: Observed) -> dict[str, list[IdleCauses]]:
    """Idle time of each rank as planned and, where it is known, as measured."""
    if found.plan is None or found.planned is None:
        return {}
    graph, schedule = found.plan.graph, found.plan.schedule
    result = {"planned": idle_causes(graph, schedule, found.planned.start, found.planned.end)}
    if found.measured is not None:
        result["measured"] = idle_causes(
            graph, schedule, found.measured.start, found.measured.end, straggling_seconds(found)[-1]
        )
    return result


def straggling_seconds(found: Observed) -> list[float]:
    """For each iteration: seconds from this replica's end to the slowest replica's."""
    slowest: dict[int, float] = {}
    for replica in found.replicas.values():
        for line in replica:
            seconds = float(line.get("iteration_seconds", 0.0))
            slowest[line["iteration"]] = max(seconds, slowest.get(line["iteration"], 0.0))
    own = ((line["iteration"], float(line.get("iteration_seconds", 0.0))) for line in found.lines)
    return [max(0.0, slowest.get(iteration, 0.0) - seconds) for iteration, seconds in own]


def cause_charts(by_kind: Mapping[str, Sequence[IdleCauses]]) -> list[Any]:
    """A stacked bar for each rank: the idle share of the iteration, by cause."""
    charts = []
    for kind, ranks in by_kind.items():
        whole = max(sum(asdict(r).values()) for r in ranks) or 1.0
        data: dict[str, Any] = {"rank": list(range(len(ranks)))}
        for cause in CAUSES:
            data[cause] = [100 * getattr(r, cause) / whole for r in ranks]
        chart = figure(
            name=f"causes_{kind}", title=f"{kind}: idle time of each rank", height=_HEIGHT, tools="save,reset",
            sizing_mode="stretch_width", y_axis_label="% of the iteration", x_axis_label="pipeline rank",
        )  # fmt: skip
        chart.vbar_stack(list(CAUSES), x="rank", width=0.8, color=list(_CAUSE_COLORS), source=ColumnDataSource(data),
                         legend_label=list(CAUSES), line_color=None)  # fmt: skip
        chart.add_tools(HoverTool(tooltips=[("rank", "@rank"), *((c, f"@{c}{{0.00}} %") for c in CAUSES)]))
        chart.add_layout(chart.legend[0], "right")
        chart.xaxis.ticker = list(range(0, len(ranks), -(-len(ranks) // 16)))
        charts.append(chart)
    return charts


def memory_chart(found: Observed) -> Any | None:
    """Bytes of each rank over the iteration, as the plan foresees them."""
    if found.plan is None or found.planned is None:
        return None
    plan = found.plan
    lines = memory_over_time(plan.graph, plan.schedule, found.planned.start, found.planned.end)
    chart = figure(
        name="memory", title="memory of each rank, as planned", height=_HEIGHT + 60, tools=_TOOLS,
        sizing_mode="stretch_width", x_axis_label="milliseconds since the start of the iteration",
        y_axis_label="GB (1e9 bytes)",
    )  # fmt: skip
    steps = [(np.repeat(line.seconds, 2)[1:], np.repeat(line.held, 2)[:-1]) for line in lines]
    limit = plan.graph.memory_limit
    source = ColumnDataSource(
        {
            "x": [(x * 1e3).astype(np.float32) for x, _ in steps],
            "y": [(y / 1e9).astype(np.float32) for _, y in steps],
            "rank": list(range(len(steps))),
            "peak": [float(y.max()) / 1e9 for _, y in steps],
            "color": [Viridis256[round(230 * i / max(1, len(steps) - 1))] for i in range(len(steps))],
        }
    )
    drawn = chart.multi_line(xs="x", ys="y", line_color="color", line_width=1.4, source=source)
    chart.add_tools(HoverTool(renderers=[drawn], tooltips=[("rank", "@rank"), ("peak", "@peak{0.00} GB")]))
    finite = limit[np.isfinite(limit)]
    if len(finite):
        chart.hspan(y=[float(finite.min()) / 1e9], line_color="#888888", line_dash="dashed")
    chart.y_range.start = 0  # type: ignore[attr-defined]
    return chart


def iteration_charts(lines: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Times, plan over bound, and what training waited, over the iterations."""
    if len(lines) < 2:
        return []
    data: dict[str, Any] = {"iteration": np.array([line["iteration"] for line in lines], dtype=np.int32)}
    for name, (key, _) in _LINES.items():
        if all(key in line for line in lines):
            data[name.replace(" ", "_")] = np.array([line[key] for line in lines], dtype=np.float32)
    bound, predicted = data.get("lower_bound"), data.get("predicted")
    if bound is not None and predicted is not None and (bound > 0).all():
        data["over_bound"] = predicted / bound
    for name, key in (("waited", "stall_seconds"), ("planning", "plan_seconds")):
        if all(key in line for line in lines):
            data[name] = np.array([1e3 * line[key] for line in lines], dtype=np.float32)
    source = ColumnDataSource(data)

    def chart(name: str, title: str, label: str, series: Mapping[str, str], shared: Any = None) -> Any:
        more = {} if shared is None else {"x_range": shared.x_range}
        drawn = figure(name=name, title=title, height=_HEIGHT, tools=_TOOLS, sizing_mode="stretch_width",
                       x_axis_label="iteration", y_axis_label=label, **more)  # fmt: skip
        for column, color in series.items():
            drawn.line("iteration", column, source=source, color=color, line_width=1.5,
                       legend_label=column.replace("_", " "))  # fmt: skip
        drawn.add_tools(
            HoverTool(mode="vline", tooltips=[("iteration", "@iteration"), *((c, f"@{c}{{0.0000}}") for c in series)])
        )
        drawn.legend.click_policy = "hide"
        drawn.add_layout(drawn.legend[0], "right")
        return drawn

    times = {name.replace(" ", "_"): color for name, (_, color) in _LINES.items() if name.replace(" ", "_") in data}
    charts = [chart("iterations", "time of an iteration", "seconds", times)]
    if "over_bound" in data:
        charts.append(chart("over_bound", "plan over its lower bound", "ratio", {"over_bound": "#0072B2"}, charts[0]))
    waits = {c: color for c, color in (("waited", "#D55E00"), ("planning", "#009E73")) if c in data}
    if waits:
        charts.append(chart("stalls", "planning, and what training waited for it", "milliseconds", waits, charts[0]))
    return charts


def scatter_charts(found: Observed) -> list[Any]:
    """Planned against measured: iterations, and the operations of the last one."""
    charts = []
    lines = [line for line in found.lines if line.get("iteration_seconds")]
    if len(lines) > 1:
        charts.append(_scatter(
            "scatter_iterations", "iterations", [1e3 * line["predicted_seconds"] for line in lines],
            [1e3 * line["iteration_seconds"] for line in lines], [f"iteration {line['iteration']}" for line in lines],
        ))  # fmt: skip
    if found.measured is not None and found.plan is not None and found.planned is not None:
        plan = found.plan
        planned, measured = (
            np.concatenate([e - s for s, e in zip(t.start, t.end, strict=True)]) * 1e3
            for t in (found.planned, found.measured)
        )
        names = [str(o) for rank in range(plan.graph.ranks) for o in plan.schedule.operations(plan.graph, rank)]
        charts.append(_scatter("scatter_operations", "operations of the last iteration", planned, measured, names))
    return charts


def _scatter(name: str, title: str, planned: Any, measured: Any, names: list[str]) -> Any:
    planned, measured = np.asarray(planned, dtype=np.float32), np.asarray(measured, dtype=np.float32)
    error = median(abs(p / m - 1) for p, m in zip(planned.tolist(), measured.tolist(), strict=True) if m > 0)
    drawn = figure(name=name, title=f"{title}: off by {error:.1%} (median)", height=_HEIGHT + 80, width=500,
                   tools="pan,wheel_zoom,box_zoom,reset,save", x_axis_label="planned, milliseconds",
                   y_axis_label="measured, milliseconds")  # fmt: skip
    shown = np.linspace(0, len(names) - 1, min(len(names), DOTS)).round().astype(int)
    dots = drawn.scatter(
        "planned", "measured", size=5, alpha=0.5, color="#0072B2",
        source=ColumnDataSource(
            {"planned": planned[shown], "measured": measured[shown], "name": [names[i] for i in shown]}
        ),
    )  # fmt: skip
    most = float(max(planned.max(), measured.max()))
    drawn.line([0, most], [0, most], color="#888888", line_dash="dashed")
    drawn.add_tools(HoverTool(renderers=[dots], tooltips="@name: @planned{0.000} → @measured{0.000} ms"))
    return drawn


def replica_charts(found: Observed) -> list[Any]:
    """The slowest replica over the mean: as predicted before and after an exchange, and as measured."""
    exchanged = [line for line in found.lines if line.get("exchange")]
    charts = []
    if len(exchanged) > 1:
        data = {
            "iteration": [line["iteration"] for line in exchanged],
            "before": [line["exchange"]["before"] for line in exchanged],
            "after": [line["exchange"]["after"] for line in exchanged],
        }
        charts.append(_ratio("exchange", "slowest replica over the mean, predicted", data))
    if found.replicas:
        lines = {line["iteration"]: [line.get("iteration_seconds", 0.0)] for line in found.lines}
        for replica in found.replicas.values():
            for line in replica:
                if line["iteration"] in lines:
                    lines[line["iteration"]].append(line.get("iteration_seconds", 0.0))
        whole = {i: s for i, s in lines.items() if len(s) == len(found.replicas) + 1 and sum(s) > 0}
        if len(whole) > 1:
            ratios = [max(s) * len(s) / sum(s) for s in whole.values()]
            charts.append(_ratio("replicas", "slowest replica over the mean, measured",
                                 {"iteration": list(whole), "measured": ratios}))  # fmt: skip
    return charts


def _ratio(name: str, title: str, data: dict[str, list[Any]]) -> Any:
    drawn = figure(name=name, title=title, height=_HEIGHT, tools=_TOOLS, sizing_mode="stretch_width",
                   x_axis_label="iteration", y_axis_label="ratio")  # fmt: skip
    source = ColumnDataSource(data)
    series = [column for column in data if column != "iteration"]
    for column, color in zip(series, ("#D55E00", "#0072B2"), strict=False):
        drawn.line("iteration", column, source=source, color=color, line_width=1.5, legend_label=column)
    drawn.add_tools(HoverTool(mode="vline", tooltips=[("iteration", "@iteration"), *((c, f"@{c}") for c in series)]))
    drawn.add_layout(drawn.legend[0], "right")
    return drawn
