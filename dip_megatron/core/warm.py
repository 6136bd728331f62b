"""The smallest graph: for loading compiled kernels before the first batch is there."""

from __future__ import annotations

import numpy as np

from .graph import StageGraph
from .modules import ModalityModule, Unit


def smallest_graph(ranks: int, memory_limit: float = np.inf) -> StageGraph:
    """One microbatch of one module, a layer a rank; seconds and bytes of 1."""
    one = np.ones((1, 1, ranks))
    return StageGraph(
        ranks=ranks,
        modules=(ModalityModule("warm", ((1,) * ranks,)),),
        units=(Unit(0, "warm", 0),),
        forward=one,
        backward=one,
        weight=one,
        fused=2 * one,
        activation=one,
        deferred_activation=np.zeros((1, 1, ranks)),
        transfer=np.zeros(1),
        static_bytes=np.zeros(ranks),
        memory_limit=np.full(ranks, memory_limit),
    )
