"""What is rehearsed: a model on its cluster, the batches of all replicas, what stages cost, and what goes wrong."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from ..core import Kind, Operation, OperationGraph, Payload, TensorSpec, Unit
from ..describe.cost import Costs
from ..describe.files import ConfigurationError
from ..describe.model import MultimodalModel, Partition
from ..describe.workload import Microbatch
from ..planner.model_graphs import ModelGraphs

FaultKind = Literal["planner dies", "planner is late", "rank dies"]
CHECKPOINT = "checkpoint.json"
"""In the folder of a job: what its ranks go on from."""
LATE_SECONDS = 20.0
"""For which a late planner is stopped."""

_FAULT = re.compile(r"(\d+)@(\d+)")


@dataclass(frozen=True)
class Fault:
    """What happens when ``iteration`` (from 1) begins: to the planner of replica ``who``, or to global rank ``who``."""

    kind: FaultKind
    who: int
    iteration: int

    @staticmethod
    def read(kind: FaultKind, text: str) -> Fault:
        """``WHO@ITERATION``. Raises ConfigurationError."""
        found = _FAULT.fullmatch(text)
        if found is None or int(found[2]) < 1:
            raise ConfigurationError(f"{text!r}: a fault is WHO@ITERATION, such as 0@3")
        return Fault(kind, int(found[1]), int(found[2]))

    def __str__(self) -> str:
        what = {
            "planner dies": f"the planner of replica {self.who} is killed",
            "planner is late": f"the planner of replica {self.who} is stopped for {LATE_SECONDS:.0f} s",
            "rank dies": f"global rank {self.who} is killed",
        }
        return f"{what[self.kind]} as iteration {self.iteration} begins"


@dataclass(frozen=True)
class Job:
    """``microbatches`` are those of the whole job, by number: iteration by iteration, of each replica in turn, ``each``
    of them a replica's. ``settings`` are fields of :class:`dip_megatron.config.DipConfig`; ``scale``: seconds slept for
    a second of price; ``save_interval``: iterations between two checkpoints, 0: none; ``microbatch_bytes`` travel where
    one changes replicas."""

    model: MultimodalModel
    cluster: str
    costs: Path | None
    memory_limit: float | None
    partition: Partition
    microbatches: tuple[Microbatch, ...]
    each: int
    replicas: int
    settings: dict[str, object]
    scale: float = 1.0
    save_interval: int = 0
    microbatch_bytes: int = 1 << 16
    faults: tuple[Fault, ...] = ()

    @property
    def stages(self) -> int:
        """Pipeline ranks."""
        return self.model.parallel.pp

    @property
    def ranks(self) -> int:
        """Processes: one for each pipeline rank of each replica, whatever the tensor-parallel size."""
        return self.stages * self.replicas

    @property
    def coupled(self) -> int:
        """Replicas that share a group of experts, and plan together."""
        return self.model.parallel.coupled

    @property
    def iterations(self) -> int:
        return len(self.microbatches) // (self.each * self.replicas)

    def numbers(self, replica: int, iteration: int) -> range:
        """Numbers of a replica's microbatches in an iteration, counted from 0."""
        first = (iteration * self.replicas + replica) * self.each
        return range(first, first + self.each)

    def checked(self) -> Job:
        """The same. Raises ConfigurationError for faults of what isn't there."""
        for fault in self.faults:
            most = self.ranks if fault.kind == "rank dies" else self.replicas
            if fault.who >= most or fault.iteration > self.iterations:
                raise ConfigurationError(
                    f"{fault}: this job has {self.replicas} replicas, {self.ranks} ranks, {self.iterations} iterations"
                )
        return self

    def after(self, fault: Fault) -> Job:
        """The job that is launched again: what has gone wrong goes wrong once."""
        return replace(self, faults=tuple(f for f in self.faults if f.iteration > fault.iteration))

    def write(self, folder: Path) -> None:
        """For the ranks to read."""
        with (folder / "job.pickle").open("wb") as file:
            pickle.dump(self, file)

    @staticmethod
    def read(folder: Path) -> Job:
        """What :meth:`write` wrote."""
        with (folder / "job.pickle").open("rb") as file:
            job = pickle.load(file)
        assert isinstance(job, Job)
        return job


@dataclass(frozen=True)
class OneNumber:
    """What travels between any two stages; see :class:`dip_megatron.runtime.protocol.Shapes`."""

    def payload(self, unit: Unit, load: Microbatch, *, leaves_module: bool) -> Payload:
        """The microbatch's number."""
        return (TensorSpec("hidden", (1, 1), "float32"),)


_KINDS = (Kind.F, Kind.B, Kind.W, Kind.BW)

Prices = dict[tuple[int, str, int, int], dict[str, tuple[float, ...]]]
"""Of one pipeline rank: by number of the microbatch, module, segment and first instance of the unit, then by memory
strategy, seconds of each of ``_KINDS``."""


def write_prices(job: Job, graphs: ModelGraphs, folder: Path, progress: Callable[[], None]) -> None:
    """What the stages of every pipeline rank take, a file each. They are what the cost model says alone: plans are
    priced with corrections by what earlier iterations took, and a stage that slept for those would feed them."""
    ranks: list[Prices] = [{} for _ in range(job.stages)]
    known: dict[Microbatch, OperationGraph] = {}
    for number, microbatch in enumerate(job.microbatches):
        if microbatch not in known:
            known[microbatch] = graphs.build((microbatch,), False)
            progress()
        graph = known[microbatch]
        seconds = np.stack([graph.forward, graph.backward, graph.weight, graph.fused])
        for s, u in enumerate(graph.unit_of.tolist()):
            unit = graph.units[u]
            place = (number, unit.module, graph.segment(s), unit.first)
            for p, prices in enumerate(ranks):
                prices[place] = {
                    graph.strategy_name(c, s, p): tuple(seconds[:, c, s, p].tolist()) for c in range(graph.candidates)
                }
    for p, prices in enumerate(ranks):
        with (folder / f"prices{p}.pickle").open("wb") as file:
            pickle.dump(prices, file)


def read_prices(folder: Path, rank: int) -> Prices:
    """Those of pipeline rank ``rank``."""
    with (folder / f"prices{rank}.pickle").open("rb") as file:
        prices: Prices = pickle.load(file)
    return prices


def price(prices: Prices, number: int, operation: Operation, unit: Unit, strategy: str) -> float:
    """Seconds of an operation on a unit of microbatch ``number``. Raises KeyError for one that nobody has priced.

    Plans are priced with corrections, which may make other mixes of memory strategies worth offering: one that has no
    price here takes what the mix does that differs from it in the fewest layers.
    """
    known = prices[number, operation.module, operation.segment, unit.first]
    if strategy not in known:
        strategy = min(known, key=lambda text: _unlike(text, strategy))
    return known[strategy][_KINDS.index(operation.kind)]


def _unlike(one: str, other: str) -> int:
    """In how many layers two mixes of a chunk differ, whatever their places; layers that keep everything aside."""
    counts = [Counter[str](), Counter[str]()]
    for count, text in zip(counts, (one, other), strict=True):
        for run in text.split("+"):
            name, _, layers = run.partition(":")
            count[name] += int(layers or 0)
    return sum(((counts[0] - counts[1]) + (counts[1] - counts[0])).values())


def job_graphs(job: Job, cluster: object) -> ModelGraphs:
    """What prices the job's batches as a run does, on ``cluster`` as it is loaded."""
    costs = None if job.costs is None else Costs.load(job.costs)
    return ModelGraphs(job.model, cluster, job.partition, costs, job.memory_limit)  # type: ignore[arg-type]


def module_settings(partition: Partition) -> dict[str, dict[str, object]]:
    """The partition as ``modules`` of :class:`dip_megatron.config.DipConfig`."""
    return {
        m.module: {"layers": [list(line) for line in m.layers], "unit_size": m.unit_size} for m in partition.modules
    }


def drawn(batches: Sequence[Sequence[Microbatch]]) -> tuple[Microbatch, ...]:
    """Microbatches of batches, one after the other."""
    return tuple(m for batch in batches for m in batch)
