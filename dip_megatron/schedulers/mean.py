"""The mean batch: what a static plan is tuned on, because it is made before the batches are known."""

from __future__ import annotations

import numpy as np

from ..core.graph import Floats, OperationGraph
from .common import mixed_shape


def mean_graph(graph: OperationGraph) -> OperationGraph:
    """The mixed graph with every microbatch replaced by the mean of all (durations, bytes and transfers alike)."""
    microbatches, segments = mixed_shape(graph)

    def average(array: Floats) -> Floats:
        by_unit = array.reshape(array.shape[0], microbatches, segments, graph.ranks)
        return np.ascontiguousarray(np.broadcast_to(by_unit.mean(axis=1, keepdims=True), by_unit.shape)).reshape(
            array.shape
        )

    transfer = np.tile(graph.transfer.reshape(microbatches, segments).mean(axis=0), microbatches)
    return graph.changed(average, transfer=transfer)
