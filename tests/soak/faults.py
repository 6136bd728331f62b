"""What happens to planner workers in a soak, and how its data drift."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dip_megatron.core.plan_set import PlanSet
from dip_megatron.planner.request import PlanMaker, PlanRequest
from dip_megatron.planner.service import PlannerService

FAULTS = ("dies", "babbles", "raises", "is late", "hangs")
HANG_SECONDS = 5.0


@dataclass(frozen=True)
class FaultyMaker:
    """A plan maker whose worker suffers the next of :data:`FAULTS` every ``every`` requests."""

    maker: PlanMaker
    every: int

    def warm_up(self) -> None:
        self.maker.warm_up()

    def quick(self, request: PlanRequest) -> PlanSet:
        return self.maker.quick(request)

    def best(self, request: PlanRequest, give: Callable[[PlanSet], None]) -> PlanSet:
        number, rest = divmod(request.request, self.every)
        fault = FAULTS[number % len(FAULTS)] if rest == self.every - 1 else None
        if fault == "dies":
            os._exit(3)
        if fault == "babbles":
            os.write(int(sys.argv[1]), b"?" * 100)
        if fault == "raises":
            raise RuntimeError("a fault of the soak")
        if fault == "is late":
            time.sleep(HANG_SECONDS / 2)
        if fault == "hangs":
            time.sleep(1e6)
        return self.maker.best(request, give)


class FaultyService(PlannerService):
    """A planner service with faulty workers and less patience than usual."""

    every = 0
    patient = False
    """Whether each batch waits until a worker is idle, so that a short soak meets every fault."""

    def __init__(self, maker: PlanMaker, workers: int = 1, **options: Any):
        bounds = {"hang_seconds": HANG_SECONDS, "silent_seconds": 1}
        super().__init__(FaultyMaker(maker, self.every), workers, **options | bounds)

    def submit(self, request: PlanRequest) -> None:
        deadline = time.monotonic() + 240.0
        while self.patient and not self._idle() and time.monotonic() < deadline:
            time.sleep(0.05)
        super().submit(request)

    def _idle(self) -> bool:
        return self.ready() and any(worker.ready and not worker.busy_with for worker in self._workers)


def drift(documents: Any, samples: int) -> None:
    """Let the example's documents change along the ``samples`` of a run: images become rarer, then common again."""
    plain = documents.PackedDigitDocuments.__getitem__

    def item(self: Any, index: int) -> Any:
        common = 0.5 + 0.5 * np.cos(2.0 * np.pi * index / samples)
        documents._SUMS_PER_IMAGE = (0.2 + 4.0 * (1.0 - common), 1.0 + 12.0 * (1.0 - common))
        return plain(self, index)

    documents.PackedDigitDocuments.__getitem__ = item
