"""A plan: the ordered actions of every rank for one iteration, with all that is needed to check and to run it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .codes import RankActions
from .experts import Coupled
from .graph import Ints, OperationGraph
from .order import Schedule


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape (elements) and dtype (torch's name, e.g. ``bfloat16``) of one tensor of a payload;
    ``differentiable`` tensors have a gradient of the same shape travelling back, where anything before them trains.
    ``made_by`` names the module whose stages made the tensor, where later modules hand it on as it is."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    differentiable: bool = True
    made_by: str = ""


Payload = tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Predicted:
    """What the simulator expects: seconds, idle share of all ranks' time, peak bytes per rank (static included).
    ``uncorrected_time``: seconds of the iteration by the cost model alone, where measurements have corrected it."""

    iteration_time: float
    lower_bound: float
    bubble_ratio: float
    peak_bytes: tuple[float, ...]
    uncorrected_time: float | None = None


@dataclass(frozen=True)
class SearchStatistics:
    """How the plan was found."""

    seconds: float = 0.0
    evaluations: int = 0
    workers: int = 0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """One iteration's plan.

    ``graph`` has one candidate per stage (the chosen memory strategy). ``codes[rank]`` are the rank's actions as
    numbers (:mod:`.codes`), ``actions[rank]`` the same as objects. ``payloads[(s, t)]`` says what travels from
    the last stage of virtual microbatch s to the first of t; ``payloads[(s, s)]`` what travels between the ranks of s.
    A third number names the rank whose stage sends, where what they send differs. Planning without a model to run
    leaves it empty. ``name`` is the schedule that made it, e.g. ``dip``. ``coupled``: it is one of a set of plans of
    replicas that share experts, and must not run without the others; what it predicts is the time of all together.
    """

    graph: OperationGraph
    schedule: Schedule
    codes: tuple[Ints, ...]
    predicted: Predicted
    name: str = "dip"
    payloads: Mapping[tuple[int, ...], Payload] = field(default_factory=dict)
    search: SearchStatistics = SearchStatistics()
    coupled: Coupled | None = None

    @cached_property
    def actions(self) -> RankActions:
        """What each rank does, in order."""
        return RankActions(self.graph, self.codes)

    def payload(self, source: int, target: int, rank: int) -> Payload | None:
        """What the forward of ``source`` on ``rank`` sends to ``target``, both virtual microbatches (equal: to the next
        rank); None if the plan doesn't say."""
        return self.payloads.get((source, target, rank), self.payloads.get((source, target)))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "actions"}

    def digest(self) -> str:
        """SHA-256 over all that decides what ranks do and exchange: units, actions of all ranks, payload shapes."""
        units = [(u.module, u.microbatch, u.first, u.count, u.downstream, u.rank) for u in self.graph.units]
        modules = [(m.name, m.layers, m.upstream, m.trainable, m.reversed, m.replicated) for m in self.graph.modules]
        payloads = sorted(
            (key, [(t.name, t.shape, t.dtype, t.differentiable) for t in payload])
            for key, payload in self.payloads.items()
        )
        text = json.dumps([modules, units, payloads, self.graph.strategies, [len(line) for line in self.codes]])
        digest = hashlib.sha256(text.encode())
        if self.coupled is not None:
            experts = self.coupled.experts
            text = json.dumps([self.coupled.replica, self.coupled.replicas, experts.modules, sorted(experts.repeating)])
            digest.update(text.encode())
        for line in self.codes:
            digest.update(np.ascontiguousarray(line, dtype="<i4").tobytes())
        return digest.hexdigest()


def used_strategies(plan: Plan) -> dict[str, int]:
    """How many stages use each memory strategy."""
    names, counts = np.unique(
        [
            plan.graph.strategy_name(0, s, p)
            for s in range(plan.graph.virtual_microbatches)
            for p in range(plan.graph.ranks)
        ],
        return_counts=True,
    )
    return {str(n): int(c) for n, c in zip(names, counts, strict=True)}
