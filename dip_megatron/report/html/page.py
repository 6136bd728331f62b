"""The page: figures by Bokeh, numbers as tables, all packed into one file."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from bokeh.document import Document
from bokeh.resources import Resources
from jinja2 import Environment, StrictUndefined

from ..causes import CAUSES, IdleCauses
from ..observed import Observed
from ..tables import seconds
from .charts import cause_charts, causes, iteration_charts, memory_chart, replica_charts, scatter_charts
from .palette import PALETTES, PARTS, light_theme, style_variables
from .timeline import legend, timelines


def write_report(path: Path | str, found: Observed) -> None:
    """Write what is known of a run or a plan as one HTML file, which opens from disk without a network.

    Bokeh and the figures are compressed in it; the browser unpacks them (``DecompressionStream``: browsers since 2023).
    Raises OSError when ``path`` can't be written.
    """
    by_kind = causes(found)
    memory = memory_chart(found)
    sections: list[tuple[str, str, list[Any]]] = [
        ("Timeline", "Wheel or + and - zoom, the arrow keys move, 0 shows all again. Point at a bar for what it is.",
         timelines(found)),
        ("Idle time", "What each rank waited for. Imbalance is idle time that no order of these stages could fill.",
         cause_charts(by_kind)),
        ("Memory", "Activations, with parameters, gradients and optimizer states; dashed: the limit.",
         [] if memory is None else [memory]),
        ("Iterations", "Click on a name at the right to hide its line.", iteration_charts(found.lines)),
        ("Planned against measured", "On the dashed line both are equal.", scatter_charts(found)),
        ("Replicas", "1 means that all replicas end together.", replica_charts(found)),
    ]  # fmt: skip
    document = Document()  # one for all, since charts share their ranges
    document.theme = light_theme()
    places = {}
    for chart in (chart for _, _, charts in sections for chart in charts):
        document.add_root(chart)
        places[chart.id] = f"figure-{chart.name}"
    drawing = {"document": document.to_json(deferred=False), "places": places}
    text = _template().render(
        title=f"DIP: {found.source}",
        source=found.source,
        facts=facts(found),
        legend=[] if found.plan is None else legend(found.plan),
        idle=_idle_rows(by_kind),
        causes=CAUSES,
        sections=[(title, note, [chart.name for chart in charts]) for title, note, charts in sections if charts],
        about=found.about,
        library=_packed(Resources(mode="inline", components=["bokeh"], minified=True).js_raw[0]),
        figures=_packed(json.dumps(drawing, separators=(",", ":"), allow_nan=False)),
        page_script=_resource("page.js"),
        colors=json.dumps({"palettes": PALETTES, "parts": PARTS}),
        variables=style_variables(),
        style=_resource("page.css"),
    )
    Path(path).write_text(text, encoding="utf-8")


def facts(found: Observed) -> list[tuple[str, str]]:
    """Name and value of what a reader looks for first."""
    lines = list(found.lines)
    told: list[tuple[str, str]] = []
    if found.plan is not None:
        graph = found.plan.graph
        told.append(("schedule", found.plan.name))
        told.append(("pipeline ranks", str(graph.ranks)))
        told.append(("microbatches", str(1 + max((u.microbatch for u in graph.units), default=-1))))
        told.append(("operations", str(sum(len(order) for order in found.plan.schedule.orders))))
    told.append(("iterations" if found.about or found.measured else "plans", str(len(lines))))
    settled = lines[5:] or lines  # the first iterations allocate memory and learn costs
    for name, key in (("measured", "iteration_seconds"), ("predicted", "predicted_seconds")):
        values = [line[key] for line in settled if line.get(key)]
        if values:
            told.append((f"{name}, median", seconds(median(values))))
    ratios = [line["predicted_seconds"] / line["lower_bound"] for line in settled if line.get("lower_bound")]
    if ratios:
        told.append(("plan over bound, median", f"{median(ratios):.3f}"))
    for name, key in (("planned", "bubble_ratio_planned"), ("measured", "bubble_ratio_measured")):
        values = [line[key] for line in settled if line.get(key) is not None]
        if values:
            told.append((f"bubbles {name}, median", f"{median(values):.1%}"))
    stalls = [line["stall_seconds"] for line in settled if "stall_seconds" in line]
    if stalls:
        told.append(("waited for a plan, median", seconds(median(stalls))))
    return told


def _idle_rows(by_kind: Mapping[str, Sequence[IdleCauses]]) -> list[tuple[str, list[str]]]:
    rows = []
    for kind, ranks in by_kind.items():
        for rank, one in enumerate(ranks):
            values = asdict(one)
            rows.append((f"rank {rank}, {kind}", [seconds(values[name]) for name in ("busy", *CAUSES)]))
    return rows


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _resource(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _template() -> Any:
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(_resource("page.html"))
