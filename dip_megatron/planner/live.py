"""Planning for a model that trains: its batches priced by the cost model, its plans found by the searcher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ..core import StageGraph
from ..describe.cost import LAYER_STRATEGIES, Cluster, CostModel, Costs, segmented_graph
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

    def build(self, loads: tuple[Microbatch, ...], forward_only: bool, training: Training | None = None) -> StageGraph:
        """The stage graph of one iteration, of the model as built where ``training`` is known."""
        pricer = _pricer(self.model, self.cluster, self.costs, self.recompute, self.offload)
        graph = segmented_graph(pricer, self.partition, loads, self.memory_limit, training)
        return without_training(graph) if forward_only else graph


@lru_cache(maxsize=4)
def _pricer(model: MultimodalModel, cluster: Cluster, costs: Costs | None, recompute: bool, offload: bool) -> CostModel:
    """One cost model, and with it its caches, for all iterations."""
    dropped = (() if recompute else ("activation", "selective", "mlp", "full")) + (() if offload else ("offload",))
    return CostModel(model, cluster, costs, strategies=[s for s in LAYER_STRATEGIES if s not in dropped])


def without_training(graph: StageGraph) -> StageGraph:
    """The same iteration as an evaluation: forwards only."""
    modules = tuple(replace(m, trainable=tuple((False,) * graph.ranks for _ in m.layers)) for m in graph.modules)
    return replace(graph, modules=modules)
