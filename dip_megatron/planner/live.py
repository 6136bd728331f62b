"""Planning for a model that trains: its batches priced by the cost model, its plans found by the searcher."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..cost import Cluster, Costs, build_graph
from ..model import MultimodalModel, Partition
from ..schedule import ModalityModule, StageGraph
from ..workload import Microbatch


@dataclass(frozen=True)
class ModelGraphs:
    """Graph builder of a described model (see :class:`planner.maker.GraphBuilder`); picklable. Without ``recompute``
    every stage has its fastest memory strategy only."""

    model: MultimodalModel
    cluster: Cluster
    partition: Partition
    costs: Costs | None = None
    memory_limit: float | None = None
    recompute: bool = True

    def build(self, loads: tuple[Microbatch, ...], forward_only: bool) -> StageGraph:
        """The stage graph of one iteration."""
        graph = build_graph(
            self.model, self.cluster, self.partition, loads, costs=self.costs, memory_limit=self.memory_limit
        )
        if not self.recompute and graph.candidates > 1:
            graph = graph.project(np.zeros((graph.rows, graph.ranks), dtype=np.int8))
        return without_training(graph) if forward_only else graph


def without_training(graph: StageGraph) -> StageGraph:
    """The same iteration as an evaluation: forwards only."""
    modules = tuple(
        replace(m, trainable=tuple((False,) * graph.ranks for _ in m.layers)) if isinstance(m, ModalityModule) else m
        for m in graph.modules
    )
    return replace(graph, modules=modules)
