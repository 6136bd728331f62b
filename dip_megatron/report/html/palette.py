"""Colours of the page and of its figures, in light and in dark."""

from __future__ import annotations

from bokeh.themes import Theme

PALETTES = {
    "light": {"ink": "#1c2126", "soft": "#5b6570", "paper": "#ffffff", "line": "#d9dee3", "chart": "#fbfcfd"},
    "dark": {"ink": "#e6e9ec", "soft": "#9aa5b0", "paper": "#15191d", "line": "#333b43", "chart": "#1b2025"},
}
# Which colour each property of a figure's parts has; the page's script repaints them by the same table.
PARTS = {
    "Figure": {"background_fill_color": "chart", "border_fill_color": "chart", "outline_line_color": "line"},
    "LinearAxis": {
        "axis_label_text_color": "soft",
        "major_label_text_color": "soft",
        "axis_line_color": "line",
        "major_tick_line_color": "line",
        "minor_tick_line_color": "line",
    },
    "Grid": {"grid_line_color": "line"},
    "Title": {"text_color": "ink"},
    "Legend": {"label_text_color": "ink", "background_fill_color": "chart", "border_line_color": "line"},
}


def light_theme() -> Theme:
    """What figures wear until the page's script repaints them, which costs time where there are many bars."""
    light = PALETTES["light"]
    attributes = {part: {name: light[color] for name, color in names.items()} for part, names in PARTS.items()}
    return Theme(json={"attrs": attributes})


def style_variables() -> str:
    """The same colours for the page's style sheet."""
    rules = []
    for name, colors in PALETTES.items():
        chosen = ":root" if name == "light" else f':root[data-theme="{name}"]'
        rules.append(f"{chosen} {{ " + " ".join(f"--{part}: {color};" for part, color in colors.items()) + " }")
    return "\n".join(rules)
