"""Tables for people at a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

NOTHING = "–"


def table(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, Mapping[str, str | float | int | None]]]
) -> Table:
    """A table with a row for each pair of name and values; a value is looked up by its column.

    The first of ``columns`` heads the names. Floats get four significant digits, None and missing values a dash.
    """
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for place, column in enumerate(columns):
        result.add_column(column, justify="left" if place == 0 else "right", no_wrap=place == 0)
    for name, values in rows:
        result.add_row(name, *(_text(values.get(column)) for column in columns[1:]))
    return result


def _text(value: str | float | int | None) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def seconds(value: float) -> str:
    """A duration with a fitting unit: ``1.234 s``, ``12.3 ms`` or ``45 µs``."""
    if abs(value) >= 1.0:
        return f"{value:.3f} s"
    if abs(value) >= 1e-3:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e6:.0f} µs"
