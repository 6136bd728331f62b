"""Loading what planning needs before the first batch is there."""

from __future__ import annotations

import numpy as np

from ..core import Kind, ModalityModule, Schedule, StageGraph, Unit
from ..core.experts import ExpertLayers
from ..core.joint import make_joint_plan, verify_joint
from ..core.lower import make_plan
from ..core.verify import verify
from ..schedulers.joint import search_joint


def warm_up_plans() -> None:
    """Load, or compile after an installation, the kernels that lower and verify plans: seconds once, then less than
    one."""
    graph, schedule = _tiny()
    verify(make_plan(graph, schedule, lower_bound=0.0))


def warm_up_joint_plans(search: bool) -> None:
    """The same for plans of replicas that share experts, and for their search."""
    graph, schedule = _tiny()
    experts = ExpertLayers.every(graph.modules, ["warm"])
    verify_joint(make_joint_plan([graph, graph], [schedule, schedule], experts, lower_bound=0.0))
    if search:
        search_joint([graph, graph], experts, budget_seconds=0.0, evaluations=100)


def _tiny() -> tuple[StageGraph, Schedule]:
    one = np.ones((1, 1, 2))
    graph = StageGraph(
        ranks=2,
        modules=(ModalityModule("warm", ((1, 1),)),),
        units=(Unit(0, "warm", 0),),
        forward=one,
        backward=one,
        weight=one,
        fused=2 * one,
        activation=one,
        deferred_activation=one,
        transfer=np.zeros(1),
        static_bytes=np.zeros(2),
        memory_limit=np.full(2, np.inf),
    )
    order = np.array([int(Kind.F), int(Kind.BW)], dtype=np.int32)
    return graph, Schedule((order, order.copy()), np.zeros((1, 2), dtype=np.int8))
