"""Planning for a model that trains: its batches priced by the cost model, its plans found by the searcher."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from ..core import OperationGraph
from ..core.strategies import LayerStrategy, allowed_strategies, known_strategies, register
from ..describe.cost import Cluster, CostModel, Costs, priced_graph
from ..describe.model import MultimodalModel, Partition, Training
from ..describe.workload import Microbatch


@dataclass(frozen=True)
class ModelGraphs:
    """Graph builder of a described model (see :class:`planner.maker.GraphBuilder`); picklable. Without ``recompute``
    every stage keeps all its activations; without ``offload`` none go to host memory. ``paper_costs``: with the memory
    strategies, and the choice among their mixes, that the DIP paper describes."""

    model: MultimodalModel
    cluster: Cluster
    chunks: Partition
    costs: Costs | None = None
    memory_limit: float | None = None
    recompute: bool = True
    offload: bool = True
    paper_costs: bool = False
    strategies: tuple[LayerStrategy, ...] = field(default_factory=known_strategies)

    def build(
        self, loads: tuple[Microbatch, ...], forward_only: bool, training: Training | None = None
    ) -> OperationGraph:
        """The stage graph of one iteration, of the model as built where ``training`` is known."""
        for strategy in self.strategies:
            register(strategy)  # this may be another process
        costs = pricer(self.model, self.cluster, self.costs, self.recompute, self.offload, self.paper_costs)
        graph = priced_graph(costs, self.chunks, loads, self.memory_limit, training)
        return without_training(graph) if forward_only else graph


def pricer(
    model: MultimodalModel, cluster: Cluster, costs: Costs | None, recompute: bool, offload: bool, paper: bool = False
) -> CostModel:
    """The cost model for these arguments; equal ones share one, and with it its caches, for all iterations."""
    strategies = allowed_strategies(recompute=recompute, offload=offload, paper=paper)
    return _pricer(model, cluster, costs, strategies, known_strategies(), not paper)


@lru_cache(maxsize=16)
def _pricer(
    model: MultimodalModel, cluster: Cluster, costs: Costs | None, strategies: tuple[str, ...],
    known: tuple[LayerStrategy, ...], corners: bool,
) -> CostModel:  # fmt: skip
    """``known``: the strategies there are, which a cost model takes up when it is made."""
    return CostModel(model, cluster, costs, strategies=strategies, corners=corners)


def without_training(graph: OperationGraph) -> OperationGraph:
    """The same iteration as an evaluation: forwards only."""
    modules = tuple(replace(m, trainable=tuple((False,) * graph.ranks for _ in m.layers)) for m in graph.modules)
    return replace(graph, modules=modules)
