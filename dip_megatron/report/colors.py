"""Colours of operations, the same in pictures and reports: hue says module, lightness says kind."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable

from ..core import Kind

# Hues of modules; told apart by readers with any colour vision (Okabe and Ito, 2008).
_HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_LIGHTNESS = {Kind.F: 0.72, Kind.B: 0.45, Kind.W: 0.88, Kind.BW: 0.45}
KIND_NAMES = {Kind.F: "forward", Kind.B: "input gradient", Kind.W: "weight gradient", Kind.BW: "backward"}

Color = tuple[float, float, float]  # red, green and blue, from 0 to 1


def module_colors(pairs: Iterable[tuple[str, Kind]]) -> dict[tuple[str, Kind], Color]:
    """Colour of each module and kind that occurs; by the names' order, so that pictures of one model look alike."""
    found = set(pairs)
    modules = sorted({module for module, _ in found})
    hues = {module: _HUES[i % len(_HUES)] for i, module in enumerate(modules)}
    return {(m, k): _shade(hues[m], k) for m, k in sorted(found)}


def hex_color(color: Color) -> str:
    """As ``#rrggbb``."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in color)


def _shade(color: str, kind: Kind) -> Color:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, _, saturation = colorsys.rgb_to_hls(red, green, blue)
    return colorsys.hls_to_rgb(hue, _LIGHTNESS[kind], min(saturation, 0.75))
