"""Layers to chunks: uneven where stems, heads and losses are worth layers of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ModuleLoad:
    """Seconds an iteration spends on one module, all units together: per layer, on its stem and on its head. The
    chunk with the head has ``last`` layers at least. ``given``: its layers by segment and rank, where they are settled
    and only other modules' are balanced around them."""

    name: str
    layers: int
    segments: int
    layer: float
    stem: float = 0.0
    head: float = 0.0
    last: int = 0
    given: Rows | None = None

    def fixed(self, rank: int, ranks: int) -> float:
        """Seconds that stand on a rank whatever the split."""
        return self.stem * (rank == 0) + self.head * (rank == ranks - 1)


def rank_loads(loads: Sequence[ModuleLoad], totals: Sequence[Sequence[int]]) -> list[float]:
    """Seconds of each rank if ``totals[module][rank]`` layers stand on it."""
    ranks = len(totals[0])
    return [sum(n[r] * m.layer + m.fixed(r, ranks) for m, n in zip(loads, totals, strict=True)) for r in range(ranks)]


def balance_layers(loads: Sequence[ModuleLoad], ranks: int, stage_weight: float = 0.1) -> tuple[Rows, ...]:
    """Layers per module, segment and rank.

    Minimises the seconds of the most-loaded rank plus ``stage_weight`` times the sum, over modules, of the most-loaded
    rank's seconds of that module alone (a module's slowest chunk sets the pace of its segments). A mixed-integer
    program over the layers of each rank, solved exactly to within 0.01%; each rank's layers are then dealt over its
    segments so that the longest of its chunks is as short as possible.
    """
    totals = _solve(loads, ranks, stage_weight)
    return tuple(
        m.given or tuple(zip(*(_deal(m, n[r], r, ranks) for r in range(ranks)), strict=True))
        for m, n in zip(loads, totals, strict=True)
    )


def _solve(loads: Sequence[ModuleLoad], ranks: int, stage_weight: float) -> list[list[int]]:
    modules = len(loads)
    scale = sum(m.layers * m.layer + m.stem + m.head for m in loads) / ranks or 1.0
    count = modules * ranks
    size = count + 1 + modules  # layers, the greatest load, the greatest load of each module
    rows = modules + ranks + count + max(ranks - 3, 0)
    matrix, low, high = lil_matrix((rows, size)), np.full(rows, -np.inf), np.zeros(rows)
    row = 0
    for i, m in enumerate(loads):
        matrix[row, i * ranks : (i + 1) * ranks] = 1
        low[row] = high[row] = m.layers
        row += 1
    for r in range(ranks):
        for i, m in enumerate(loads):
            matrix[row, i * ranks + r] = m.layer / scale
        matrix[row, count] = -1
        high[row] = -sum(m.fixed(r, ranks) for m in loads) / scale
        row += 1
    for i, m in enumerate(loads):
        for r in range(ranks):
            matrix[row, i * ranks + r] = m.layer / scale
            matrix[row, count + 1 + i] = -1
            high[row] = -m.fixed(r, ranks) / scale
            row += 1
    settled = any(m.given for m in loads)
    for r in range(1, 1 if settled else ranks - 2):  # ranks between the first and the last are alike: order them
        matrix[row, r], matrix[row, r + 1] = -1, 1
        row += 1
    objective = np.zeros(size)
    objective[count] = 1.0
    objective[count + 1 :] = stage_weight
    lower = np.zeros(size)
    lower[ranks - 1 : count : ranks] = [m.last for m in loads]
    upper = np.concatenate([np.repeat([m.layers for m in loads], ranks), np.full(1 + modules, np.inf)])
    for i, m in enumerate(loads):
        if m.given:
            lower[i * ranks : (i + 1) * ranks] = upper[i * ranks : (i + 1) * ranks] = np.sum(m.given, axis=0)
    result = milp(
        objective,
        constraints=LinearConstraint(matrix.tocsr(), low, high),
        integrality=np.concatenate([np.ones(count), np.zeros(1 + modules)]),
        bounds=Bounds(lower, upper),
        options={"mip_rel_gap": 1e-4, "time_limit": 5.0},
    )
    if result.x is None:
        raise ValueError(f"layers can't be split over {ranks} ranks: {result.message}")
    solved = np.rint(result.x[:count]).astype(int).reshape(modules, ranks)
    return [[int(n) for n in line] for line in solved]


def _deal(m: ModuleLoad, layers: int, rank: int, ranks: int) -> tuple[int, ...]:
    """One rank's layers over its segments: each goes to the chunk that is shortest so far, stem and head counted, but
    those that the chunk with the head must have."""
    seconds = [
        m.stem * (rank == 0 and k == 0) + m.head * (rank == ranks - 1 and k == m.segments - 1)
        for k in range(m.segments)
    ]
    counts = [0] * m.segments
    for n in range(layers):
        must = rank == ranks - 1 and n < m.last
        k = m.segments - 1 if must else min(range(m.segments), key=lambda k: (round(seconds[k] + m.layer, 12), k))
        counts[k] += 1
        seconds[k] += m.layer
    return tuple(counts)
