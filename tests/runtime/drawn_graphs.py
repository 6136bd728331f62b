"""Graphs with drawn durations, so that plans come in orders that no cost model would think of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dip_megatron.core import ModalityModule, OperationGraph, Unit


def drawn_graph(modules: tuple[ModalityModule, ...], units: Sequence[Unit], seed: int) -> OperationGraph:
    """These modules' stages of these units; memory without a limit. Units of replicated modules run on drawn ranks."""
    ranks, segments = len(modules[0].layers[0]), {m.name: m.segments for m in modules}
    virtual_microbatches = sum(segments[u.module] for u in units)
    draw = np.random.default_rng(seed).uniform(0.2, 2.0, (5, 1, virtual_microbatches, ranks))
    whole = {m.name for m in modules if m.replicated}
    places = np.random.default_rng(seed).integers(0, ranks, len(units)).tolist()
    units = [replace(u, rank=places[u.id]) if u.module in whole else u for u in units]
    rows = [u for u in units for _ in range(segments[u.module])]
    for s, unit in enumerate(rows):
        if unit.rank is not None:
            draw[:, :, s, np.arange(ranks) != unit.rank] = 0.0
    return OperationGraph(
        ranks=ranks,
        modules=modules,
        units=tuple(units),
        forward=draw[0],
        backward=draw[1],
        weight=draw[2],
        fused=draw[1] + draw[2],
        activation=draw[3],
        deferred_activation=draw[4],
        transfer=np.full(virtual_microbatches, 0.05),
        static_bytes=np.zeros(ranks),
        memory_limit=np.full(ranks, np.inf),
    )
