"""Planning for a model that trains: its batches priced by the cost model, its plans found by the searcher."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from ..core import StageGraph
from ..core.strategies import LayerStrategy, allowed_strategies, known_strategies, register
from ..describe.cost import Cluster, CostModel, Costs, segmented_graph
from ..describe.model import MultimodalModel, Partition, Training
from ..describe.workload import Microbatch


@dataclass(frozen=True)
class ModelGraphs:
    """Graph builder of a described model (see :class:`planner.maker.GraphBuilder`); picklable. Without ``recompute``
    every stage keeps all its activations; without ``offload`` none go to host memory."""

    model: MultimodalModel
    cluster: Cluster
    partition: Partition
    costs: Costs | None = None
    memory_limit: float | None = None
    recompute: bool = True
    offload: bool = True
    strategies: tuple[LayerStrategy, ...] = field(default_factory=known_strategies)

    def build(self, loads: tuple[Microbatch, ...], forward_only: bool, training: Training | None = None) -> StageGraph:
        """The stage graph of one iteration, of the model as built where ``training`` is known."""
        for strategy in self.strategies:
            register(strategy)  # this may be another process
        pricer = _pricer(self.model, self.cluster, self.costs, self.recompute, self.offload)
        graph = segmented_graph(pricer, self.partition, loads, self.memory_limit, training)
        return without_training(graph) if forward_only else graph


@lru_cache(maxsize=4)
def _pricer(model: MultimodalModel, cluster: Cluster, costs: Costs | None, recompute: bool, offload: bool) -> CostModel:
    """One cost model, and with it its caches, for all iterations."""
    return CostModel(model, cluster, costs, strategies=allowed_strategies(recompute=recompute, offload=offload))


def without_training(graph: StageGraph) -> StageGraph:
    """The same iteration as an evaluation: forwards only."""
    modules = tuple(replace(m, trainable=tuple((False,) * graph.ranks for _ in m.layers)) for m in graph.modules)
    return replace(graph, modules=modules)
