"""Loading what planning needs before the first batch is there."""

from __future__ import annotations

import numpy as np

from ..core import Kind, OperationGraph, Schedule
from ..core.experts import ExpertLayers
from ..core.lower import make_plan, make_plan_set
from ..core.verify import verify
from ..core.warm import smallest_graph
from ..schedulers.dip.engine import warm_up
from ..schedulers.dip.options import SearchOptions
from ..schedulers.joint import search_joint
from .balance import Work, assign
from .resample import SampleWork, resample


def warm_up_plans() -> None:
    """Load, or compile after an installation, the kernels that lower and verify plans: seconds once, then less than
    one."""
    graph, schedule = _smallest()
    verify(make_plan(graph, schedule, lower_bound=0.0))


def warm_up_joint_plans(search: bool) -> None:
    """The same for plans of replicas that share experts, and for their search."""
    graph, schedule = _smallest()
    experts = ExpertLayers.every(graph.modules, [m.name for m in graph.modules])
    verify(*make_plan_set([graph, graph], [schedule, schedule], experts, lower_bound=0.0).plans)
    if search:
        # However good what is found first, walks are loaded, too; the last one, which kicks, has the rest of so many.
        search_joint([graph, graph], experts, budget_seconds=0.0, evaluations=4000, options=SearchOptions(gap=-1.0))


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
    warm_up_joint_plans(search=True)
    warm_up_exchanges(samples=True)


def _smallest() -> tuple[OperationGraph, Schedule]:
    graph = smallest_graph(2)
    order = np.array([int(Kind.F), int(Kind.BW)], dtype=np.int32)
    return graph, Schedule((order, order.copy()), np.zeros((1, 2), dtype=np.int8))
