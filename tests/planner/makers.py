"""Plan makers that behave, and misbehave, in a planner worker."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import threading
import time
from dataclasses import dataclass, replace

import numpy as np

from dip_megatron.core import SearchStatistics
from dip_megatron.core.lower import make_plan
from dip_megatron.core.plan_set import PlanSet
from dip_megatron.schedulers.greedy import greedy
from tests.graphs import random_graph


def message(data: bytes) -> bytes:
    """As multiprocessing's connections frame it."""
    return struct.pack("!i", len(data)) + data


GARBAGE = {
    "noise": bytes(range(97, 123)) * 4,
    "endless": struct.pack("!i", -1) + struct.pack("!Q", 1 << 62),
    "half a message": message(bytes(1000))[:500],
    "no pickle": message(b"no pickle"),
    "no answer": message(pickle.dumps("an answer")),
    "no plan": message(pickle.dumps((1, "a plan", True, None, 0.0))),
    "another's plan": message(pickle.dumps((-1, None, True, None, 0.0))),
}
"""What a worker may send that is no plan, by name."""


def name_of(plans: PlanSet) -> str:
    """The name of the only plan of a set."""
    (plan,) = plans.plans
    return plan.name


def priority() -> int:
    """Of the calling thread: 0 usual, 19 lowest."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@dataclass(frozen=True)
class Maker:
    """Plans a drawn graph per request; ``fault`` is what its worker does on request 1."""

    fault: str = ""

    def warm_up(self) -> None:
        pass

    def quick(self, request) -> PlanSet:
        return self._plan(request, "greedy", 0)

    def best(self, request, give) -> PlanSet:
        if request.request == 1:
            if self.fault == "dies":
                os._exit(3)
            if self.fault == "hangs":
                time.sleep(600)
            if self.fault in GARBAGE:
                os.write(int(sys.argv[1]), GARBAGE[self.fault])
                time.sleep(600)
            if self.fault == "slow":
                time.sleep(1.5)
            if self.fault == "raises":
                raise RuntimeError("no luck")
            if self.fault == "invalid":
                (plan,) = self._plan(request, "worker", 1).plans
                return PlanSet((replace(plan, codes=plan.codes[::-1]),))
            if self.fault == "late":
                give(self._plan(request, "first", 1))
                time.sleep(600)
            if self.fault == "tells its priorities":
                before = priority()
                give(self._plan(request, "first", 1))
                return self._plan(request, f"{before}, then {priority()}", 1)
        return self._plan(request, "worker", 1)

    def _plan(self, request, name: str, workers: int) -> PlanSet:
        graph = random_graph(request.request, ranks=2, microbatches=3, candidates=1)
        graph = replace(graph, memory_limit=np.full(2, np.inf))
        search = SearchStatistics(0.0, 1, workers, 0)
        return PlanSet((make_plan(graph, greedy(graph), lower_bound=0.0, name=name, search=search),))
