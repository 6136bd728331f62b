"""Which mixes of memory strategies a chunk is offered: the frontier of its layers' seconds and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations, pairwise
from math import comb

import numpy as np
from numpy.typing import NDArray

from ...core.graph import Floats

Counts = NDArray[np.int64]


def pareto(seconds: Floats, size: Floats) -> Counts:
    """Indices of the choices that nothing else beats in both seconds and bytes, fastest first."""
    order = np.lexsort((size, seconds))
    least = np.minimum.accumulate(size[order])
    keep = np.ones(len(order), dtype=bool)
    keep[1:] = size[order][1:] < least[:-1] * (1 - 1e-9) - 1e-3
    return order[keep]


_ENUMERATED = 60_000
_THINNED = 400


def frontier(layers: int, seconds: Floats, size: Floats) -> tuple[Counts, Floats, Floats]:
    """All undominated ways to give each of ``layers`` equal layers one of the strategies with the given cost.

    Returns counts ``[n, strategies]``, seconds ``[n]`` and bytes ``[n]``, fastest first: the exact multiple-choice
    knapsack frontier, by enumeration; of very long chunks that of two halves, each thinned to 400 points.
    """
    options = pareto(seconds, size)
    if comb(layers + len(options) - 1, len(options) - 1) > _ENUMERATED:
        left = _thin(frontier(layers // 2, seconds, size))
        right = left if layers % 2 == 0 else _thin(frontier(layers - layers // 2, seconds, size))
        counts = (left[:, None] + right[None]).reshape(-1, len(seconds))
    else:
        ways = _compositions(layers, len(options))
        counts = np.zeros((len(ways), len(seconds)), dtype=np.int64)
        counts[:, options] = ways
    keep = pareto(counts @ seconds, counts @ size)
    counts = counts[keep]
    return counts, counts @ seconds, counts @ size


def _thin(points: tuple[Counts, Floats, Floats]) -> Counts:
    """Counts of at most _THINNED points of a frontier, evenly along it, both ends included."""
    counts = points[0]
    return counts[np.unique(np.linspace(0, len(counts) - 1, _THINNED).astype(np.int64))]


@lru_cache(maxsize=256)
def _compositions(total: int, parts: int) -> Counts:
    """All ways to write ``total`` as an ordered sum of ``parts`` numbers from 0, ``[n, parts]``; not to be written to.

    By stars and bars: ``parts - 1`` bars among as many places as there are stars and bars. Every chunk of as many
    layers asks for the same ones, whatever its batch: they are most of what pricing a chunk would cost.
    """
    places = list(combinations(range(total + parts - 1), parts - 1))
    bars = np.array(places, dtype=np.int64).reshape(len(places), parts - 1)
    edges = np.full((len(bars), parts + 1), -1, dtype=np.int64)
    edges[:, 1:-1], edges[:, -1] = bars, total + parts - 1
    found: Counts = edges[:, 1:] - edges[:, :-1] - 1
    found.flags.writeable = False
    return found


def combine(
    parts: Sequence[tuple[int, Floats, Floats]],
) -> tuple[list[Counts], Floats, Floats]:
    """:func:`frontier` of several kinds of layers together: counts per kind ``[n, strategies]``, seconds, bytes."""
    total: list[Counts] = []
    seconds, size = np.zeros(1), np.zeros(1)
    for layers, layer_seconds, layer_size in parts:
        counts, more_seconds, more_size = frontier(layers, layer_seconds, layer_size)
        all_seconds = (seconds[:, None] + more_seconds[None]).ravel()
        all_size = (size[:, None] + more_size[None]).ravel()
        keep = pareto(all_seconds, all_size)
        left, right = np.divmod(keep, len(more_seconds))
        total = [t[left] for t in total] + [counts[right]]
        seconds, size = all_seconds[keep], all_size[keep]
    return total, seconds, size


def pick(seconds: Floats, size: Floats, limit: int, *, corners: bool = False) -> Counts:
    """At most ``limit`` of a frontier (fastest first): the fastest, the leanest, and the fastest other one of each of
    limit - 2 equal memory buckets between them (section 2c of the paper). Indices, fastest first.

    Buckets pass over corners of the frontier, where a little time saves many bytes. With ``corners`` those of its lower
    convex hull come first, the sharpest first, and buckets share what is left of ``limit``.
    """
    count = len(seconds)
    if count <= max(limit, 1):
        return np.arange(count)
    if limit == 1:
        return np.array([0])
    chosen = {0, count - 1}
    if corners:
        chosen.update(_corners(seconds, size)[: limit - 2])
    between = np.arange(1, count - 1)
    buckets = limit - len(chosen)
    edges = np.linspace(size[-1], size[0], buckets + 1)
    for low, high in pairwise(edges):
        inside = [i for i in between[(size[between] >= low) & (size[between] < high)].tolist() if i not in chosen]
        if inside:
            chosen.add(inside[0])
    return np.array(sorted(chosen))


def _corners(seconds: Floats, size: Floats) -> list[int]:
    """Corners of the lower convex hull of a frontier (fastest first), without its ends; those that stand out most from
    the line between their neighbours first."""
    hull: list[int] = []

    def above(a: int, b: int, c: int) -> float:
        """How far point b lies over the line from a to c, times that line's length in bytes."""
        return float((seconds[b] - seconds[a]) * (size[a] - size[c]) - (seconds[c] - seconds[a]) * (size[a] - size[b]))

    for i in range(len(seconds)):
        while len(hull) > 1 and above(hull[-2], hull[-1], i) >= 0:
            hull.pop()
        hull.append(i)
    triples = zip(hull, hull[1:], hull[2:], strict=False)
    return [b for _, b in sorted((above(a, b, c), b) for a, b, c in triples)]
