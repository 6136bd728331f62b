"""The timeline: an operation a bar, a row for each rank; planned and measured below one another on one clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.models import BoxZoomTool, ColumnDataSource, HoverTool, PanTool, Range1d, ResetTool, SaveTool, WheelZoomTool
from bokeh.plotting import figure
from bokeh.transform import linear_cmap
from numpy.typing import NDArray

from ...core import Kind, Plan
from ...core.graph import Floats
from ..colors import KIND_NAMES, hex_color, module_colors
from ..observed import Observed

ROW_PIXELS = (14, 40)  # of one rank's row: where there are many ranks, and where there are few
TICKS = 16  # ranks named at most, so that names of 64 don't run into each other


def timelines(found: Observed) -> list[Any]:
    """Figures of the plan and of what was measured, those that are known; the first is named ``timeline``."""
    plan = found.plan
    if plan is None or found.planned is None:
        return []
    columns, palette = _columns(plan)
    planned, measured = found.planned, found.measured
    longest = max(planned.iteration_time, 0.0 if measured is None else measured.seconds)
    shared = Range1d(start=0.0, end=longest * 1e3 * 1.005, bounds=(-0.05 * longest * 1e3, 1.1 * longest * 1e3))
    sides = {"planned": (planned.start, planned.end)}
    if measured is not None:
        sides["measured"] = (measured.start, measured.end)
    for name, (start, end) in sides.items():
        columns[f"{name}_start"], columns[f"{name}_end"] = _milliseconds(start), _milliseconds(end)
        columns[name] = columns[f"{name}_end"] - columns[f"{name}_start"]
    source = ColumnDataSource(columns)  # one for both figures: it is most of the file
    return [_figure(name, plan.graph.ranks, list(sides), source, shared, palette) for name in sides]


def legend(plan: Plan) -> list[tuple[str, str]]:
    """Words and colours of what the timeline shows."""
    pairs = sorted({(plan.graph.units[u].module, kind) for u, kind in _units_and_kinds(plan)})
    return [(f"{module} {KIND_NAMES[Kind(kind)]}", color) for (module, kind), color in _paint(plan, pairs)]


def _paint(plan: Plan, pairs: Sequence[tuple[str, int]]) -> list[tuple[tuple[str, int], str]]:
    colors = module_colors((m, Kind(k)) for m, k in pairs)
    return [(pair, hex_color(colors[pair[0], Kind(pair[1])])) for pair in pairs]


def _units_and_kinds(plan: Plan) -> set[tuple[int, int]]:
    graph = plan.graph
    stages = graph.virtual_microbatches
    return {
        (int(graph.unit_of[code % stages]), int(code // stages))
        for order in plan.schedule.orders
        for code in np.unique(order)
    }


def _milliseconds(seconds: Sequence[Floats]) -> NDArray[np.float32]:
    return (np.concatenate(seconds) * 1e3).astype(np.float32)


def _columns(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """What is known of each operation without its time, all ranks one after the other; and the colours."""
    graph = plan.graph
    pairs = sorted({(graph.units[u].module, kind) for u, kind in _units_and_kinds(plan)})
    place = {pair: i for i, pair in enumerate(pairs)}
    columns: dict[str, list[Any]] = {name: [] for name in ("rank", "operation", "microbatch", "shapes", "color")}
    shapes = [_shapes(plan, stage) for stage in range(graph.virtual_microbatches)]
    for rank in range(graph.ranks):
        for code, operation in zip(plan.schedule.orders[rank], plan.schedule.operations(graph, rank), strict=True):
            columns["rank"].append(rank)
            columns["operation"].append(str(operation))
            columns["microbatch"].append(graph.units[operation.unit].microbatch)
            columns["shapes"].append(shapes[int(code) % graph.virtual_microbatches])
            columns["color"].append(place[operation.module, int(operation.kind)])
    data: dict[str, Any] = dict(columns)
    for name, kind in (("rank", np.int32), ("microbatch", np.int32), ("color", np.uint8)):
        data[name] = np.array(columns[name], dtype=kind)
    return data, [color for _, color in _paint(plan, pairs)]


def _shapes(plan: Plan, stage: int) -> str:
    """What travels between the ranks of a virtual microbatch, or what its unit holds where the plan doesn't say."""
    payload = plan.payloads.get((stage, stage))
    if payload:
        return ", ".join(f"{t.name} {'x'.join(map(str, t.shape))} {t.dtype}" for t in payload)
    unit = plan.graph.units[int(plan.graph.unit_of[stage])]
    return f"instances {unit.first} to {unit.first + unit.count - 1}" if unit.count > 1 else f"instance {unit.first}"


def _figure(
    name: str, ranks: int, sides: Sequence[str], source: ColumnDataSource, shared: Range1d, palette: list[str]
) -> Any:
    wheel = WheelZoomTool(dimensions="width")
    row = min(ROW_PIXELS[1], max(ROW_PIXELS[0], 500 // ranks))
    chart = figure(
        name="timeline" if name == "planned" else "timeline_measured", title=name, height=60 + row * ranks,
        sizing_mode="stretch_width", x_range=shared, y_range=Range1d(start=ranks - 0.5, end=-0.5),
        tools=[PanTool(dimensions="width"), wheel, BoxZoomTool(dimensions="width"), ResetTool(), SaveTool()],
        active_scroll=wheel, output_backend="canvas", lod_threshold=None,
    )  # fmt: skip
    bars = chart.hbar(
        y="rank", left=f"{name}_start", right=f"{name}_end", height=0.86, line_color=None, source=source,
        fill_color=linear_cmap("color", palette, -0.5, len(palette) - 0.5),
    )  # fmt: skip
    known = [f"{what} <b>@{what}{{0.000}} ms</b>" for what in sides]
    chart.add_tools(
        HoverTool(
            renderers=[bars], point_policy="follow_mouse",
            tooltips=f"<div><b>@operation</b> · microbatch @microbatch<br>{' · '.join(known)}<br>@shapes</div>",
        )
    )  # fmt: skip
    chart.yaxis.ticker = list(range(0, ranks, -(-ranks // TICKS)))
    chart.yaxis.axis_label = "pipeline rank"
    chart.xaxis.axis_label = "milliseconds since the start of the iteration"
    chart.ygrid.grid_line_color = None
    return chart
