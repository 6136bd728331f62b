"""Loading what planning needs before the first batch is there."""

from __future__ import annotations

import numpy as np

from ..core import Kind, OperationGraph, Schedule
from ..core.experts import ExpertLayers
from ..core.lower import make_plan_set
from ..core.verify import verify
from ..core.warm import smallest_graph
from ..schedulers.dip.engine import warm_up
from ..schedulers.dip.options import SearchOptions
from ..schedulers.joint import search_joint
from .balance import Work, assign
from .resample import SampleWork, resample


def warm_up_plans() -> None:
    """Load, or compile after an installation, the kernels that lower and verify plans, those of coupled replicas, too:
    seconds once, then less than one."""
    graphs, experts, schedule = _smallest()
    verify(*make_plan_set(graphs, [schedule] * len(graphs), experts, lower_bound=0.0).plans)


def warm_up_joint_search() -> None:
    """Load, or compile after an installation, the kernels of the search for plans of coupled replicas."""
    graphs, experts, _ = _smallest()
    # However good what is found first, walks are loaded, too; the last one, which kicks, has the rest of so many.
    search_joint(graphs, experts, budget_seconds=0.0, evaluations=4000, options=SearchOptions(gap=-1.0))


def warm_up_exchanges(samples: bool) -> None:
    """The same for what decides which microbatches replicas exchange, and which ``samples`` of them."""
    seconds = np.array([[3.0], [1.0], [1.0], [1.0]])
    replica = np.array([0, 0, 1, 1])
    work = Work(seconds, np.zeros_like(seconds), replica, 2)
    assign(work, "free", 1.0)
    if samples:
        ones = np.ones(4, dtype=np.int64)
        held = SampleWork(seconds, np.zeros_like(seconds), ones, np.arange(4), np.zeros(4, dtype=np.bool_), ones)
        resample(held, work, replica, 1.0)


def warm_up_all() -> None:
    """The same for whatever plans and searches: after an installation, a minute or two of a core."""
    warm_up_plans()
    warm_up()
    warm_up_joint_search()
    warm_up_exchanges(samples=True)


def _smallest() -> tuple[list[OperationGraph], ExpertLayers, Schedule]:
    """Two coupled replicas, and a schedule of each."""
    graph = smallest_graph(2)
    order = np.array([int(Kind.F), int(Kind.BW)], dtype=np.int32)
    experts = ExpertLayers.every(graph.modules, [m.name for m in graph.modules])
    return [graph, graph], experts, Schedule((order, order.copy()), np.zeros((1, 2), dtype=np.int8))
