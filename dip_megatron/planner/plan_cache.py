"""Plans made before, by what their microbatches hold: for loops that show a batch only when it is to run."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from ..core.plan_set import PlanSet
from ..describe.cost import Corrections
from .request import PlanRequest


@dataclass(frozen=True)
class CachedPlan:
    """``plans`` with the ``corrections`` of the costs they were made with; ``searched``: for long, because the batch
    has come again."""

    plans: PlanSet
    corrections: Corrections
    searched: bool


class PlanCache:
    """The plans of the last ``most`` different batches. A batch is the same if its microbatches, and those of all
    replicas it is planned with, hold the same in the same order, and the same parameters train: plans hold shapes."""

    def __init__(self, most: int = 64):
        self._most = most
        self._plans: OrderedDict[object, CachedPlan] = OrderedDict()

    def plan(self, request: PlanRequest) -> CachedPlan | None:
        """The plan for such a batch, if there has been one."""
        found = self._plans.get(_signature(request))
        if found is not None:
            self._plans.move_to_end(_signature(request))
        return found

    @staticmethod
    def same(one: PlanRequest, other: PlanRequest) -> bool:
        """Whether a plan of one is a plan of the other."""
        return _signature(one) == _signature(other)

    def keep(self, request: PlanRequest, plans: PlanSet, searched: bool) -> None:
        """Use ``plans`` for such batches from now on."""
        self._plans[_signature(request)] = CachedPlan(plans, request.corrections, searched)
        if len(self._plans) > self._most:
            self._plans.popitem(last=False)


def _signature(request: PlanRequest) -> object:
    return request.forward_only, request.training, request.replicas
