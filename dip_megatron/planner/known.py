"""Plans made before, by what their microbatches hold: for loops that show a batch only when it is to run."""

from __future__ import annotations

from collections import OrderedDict

from ..core import Plan
from .request import PlanRequest


class KnownPlans:
    """The plans of the last ``most`` different batches. A batch is the same if its microbatches hold the same, in the
    same order: shapes travel in plans."""

    def __init__(self, most: int = 64):
        self._most = most
        self._plans: OrderedDict[object, tuple[Plan, bool]] = OrderedDict()

    def plan(self, request: PlanRequest) -> Plan | None:
        """The plan for such a batch, if there has been one."""
        found = self._plans.get(_signature(request))
        if found is None:
            return None
        self._plans.move_to_end(_signature(request))
        return found[0]

    def searched(self, request: PlanRequest) -> bool:
        """Whether it is one that a search has found."""
        found = self._plans.get(_signature(request))
        return found is not None and found[1]

    @staticmethod
    def same(one: PlanRequest, other: PlanRequest) -> bool:
        """Whether a plan of one is a plan of the other."""
        return _signature(one) == _signature(other)

    def keep(self, request: PlanRequest, plan: Plan, searched: bool) -> None:
        """Use ``plan`` for such batches from now on."""
        self._plans[_signature(request)] = plan, searched
        if len(self._plans) > self._most:
            self._plans.popitem(last=False)


def _signature(request: PlanRequest) -> object:
    return request.forward_only, request.loads
