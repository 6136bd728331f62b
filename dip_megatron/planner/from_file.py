"""Plans of a file in a training run: checked before anything is built, then matched to batches by what these hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..core import Kind, ModalityModule, Plan, Unit
from ..core.files import PlanFileError, read_plans
from ..core.plan_set import PlanSet
from ..core.strategies import StrategyError, parse_strategy
from ..core.verify import PlanError, verify
from ..describe.cost import Corrections
from ..describe.files import ConfigurationError
from ..describe.model import ModelError, ModulePartition, MultimodalModel, Partition, Training
from ..describe.workload import Microbatch
from .maker import OperationShapes, PayloadShapes, payloads
from .prefetch import Prefetch
from .request import PlannerStatistics, PlanRequest, Service


class NoPlanError(ValueError):
    """A batch that no plan of the file matches; the message says what the batch holds, and the way out."""


@dataclass(frozen=True, eq=False)
class PlanFile:
    """The verified plans of one file, all of the same chunks."""

    path: Path
    plans: tuple[Plan, ...]

    @staticmethod
    def read(path: Path, ranks: int) -> PlanFile:
        """Read and verify. Raises ConfigurationError, which names the plan and its first wrong operation."""
        plans: list[Plan] = []
        try:
            for plan in read_plans(path):
                plans.append(plan)
                place = f"{path}: plan {len(plans)}"
                if plan.graph.ranks != ranks:
                    raise ConfigurationError(
                        f"{place} is for {plan.graph.ranks} pipeline ranks, this run has {ranks}; plan for as many"
                    )
                if plan.coupled is not None:
                    raise ConfigurationError(
                        f"{place} is replica {plan.coupled.replica}'s of {plan.coupled.replicas} that share experts "
                        "and can't run alone; plan for replicas that don't"
                    )
                verify(plan)
                if plan.graph.modules != plans[0].graph.modules:
                    raise ConfigurationError(f"{place} has other chunks than plan 1; give them a file of their own")
        except PlanFileError as error:
            raise ConfigurationError(str(error)) from error
        except PlanError as error:
            raise ConfigurationError(f"{path}: plan {len(plans)}: {error}; nothing has run") from error
        file = PlanFile(path, tuple(plans))
        file.check_strategies()
        return file

    @property
    def modules(self) -> tuple[ModalityModule, ...]:
        """What the plans' chunks hold."""
        return self.plans[0].graph.modules

    def partition(self, model: MultimodalModel) -> Partition:
        """The chunks of plans over modality segments, with the largest units there are as unit sizes.

        Raises ConfigurationError if they are not this model's.
        """
        partition = Partition(
            tuple(ModulePartition(m.name, m.layers, self._unit_size(m.name), m.replicated) for m in self.modules)
        )
        try:
            partition.check(model)
        except ModelError as error:
            raise ConfigurationError(f"{self.path}: {error}") from error
        return partition

    def _unit_size(self, module: str) -> int | None:
        """The most instances of a unit, if any microbatch has several units; None: whole microbatches."""
        split, most = False, 1
        for plan in self.plans:
            mine = [u for u in plan.graph.units if u.module == module]
            split = split or len({u.microbatch for u in mine}) < len(mine)
            most = max([most, *(u.count for u in mine)])
        return most if split else None

    def check(self, modules: Sequence[ModalityModule]) -> None:
        """Raise ConfigurationError unless the plans are of chunks as this run builds them."""
        ours, theirs = [m.name for m in self.modules], [m.name for m in modules]
        if ours != theirs:
            raise ConfigurationError(
                f"{self.path}: its plans have the modules {', '.join(ours)}, this run has {', '.join(theirs)}; give "
                "the --dip-schedule that they are for"
            )
        for mine, built in zip(self.modules, modules, strict=True):
            for what in ("layers", "upstream", "reversed", "replicated"):
                said, found = _property(mine, what), _property(built, what)
                if said != found:
                    raise ConfigurationError(
                        f"{self.path}: modules.{mine.name}.{what}: the plans have {said}, this run has {found}; plan "
                        "for the model as it is trained"
                    )

    def check_strategies(self) -> None:
        """Raise ConfigurationError at the first memory strategy that is none, or is for another number of layers."""
        known: set[tuple[str, int]] = set()
        for number, plan in enumerate(self.plans, start=1):
            graph = plan.graph
            for s in range(graph.virtual_microbatches):
                layers = graph.module(graph.units[int(graph.unit_of[s])].module).layers[graph.segment(s)]
                for rank in range(graph.ranks):
                    pair = graph.strategy_name(0, s, rank), layers[rank]
                    if pair[0] == "none" or pair in known:
                        continue
                    try:
                        parse_strategy(*pair)
                    except StrategyError as error:
                        operation = graph.operation(Kind.F, s, rank)
                        raise ConfigurationError(f"{self.path}: plan {number}: {operation}: {error}") from error
                    known.add(pair)


def _property(module: ModalityModule, what: str) -> object:
    if what == "reversed":
        return [module.runs_back(k) for k in range(module.segments)]
    return getattr(module, what)


def _trains_as(plan: Plan, training: Training | None) -> bool:
    """Whether a plan has weight gradients where the model as built has them, and nowhere else."""
    if training is None:
        return True
    return all(
        m.trains(k, r) == chunk.trains
        for m in plan.graph.modules
        for k, line in enumerate(training.of_module(m.name))
        for r, chunk in enumerate(line)
    )


@dataclass(eq=False)
class FilePlanner:
    """A planner service that takes plans from a file. Of several that match a batch it takes the one used least, in
    the order of the file, so that the plans of a run fit its repetition one after the other.

    ``otherwise`` plans evaluations, and, with ``falls_back``, batches that no plan matches; without it they raise
    NoPlanError.
    """

    file: PlanFile
    model: MultimodalModel
    shapes: PayloadShapes | OperationShapes
    otherwise: Service
    falls_back: bool = False
    _uses: list[int] = field(init=False)
    _found: dict[int, Plan | NoPlanError] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._uses = [0] * len(self.file.plans)

    @property
    def statistics(self) -> PlannerStatistics:
        """Of both together."""
        return self.otherwise.statistics

    def submit(self, request: PlanRequest) -> None:
        """Look for a plan."""
        plan = None if request.forward_only else self._match(request)
        if plan is not None:
            self._found[request.request] = plan
        elif request.forward_only or self.falls_back:
            self.otherwise.submit(request)
        else:
            held = in_words(self.model, request.loads)
            if not any(_trains_as(plan, request.training) for plan in self.file.plans):
                held += ", with the chunks that train in the model as built"
            self._found[request.request] = NoPlanError(
                f"none of the {len(self.file.plans)} plans of {self.file.path} is for a batch of {held}; give a "
                "--dip-schedule, too, to plan such batches under"
            )

    def take(self, request: int, wait_seconds: float, ahead: Prefetch | None = None) -> PlanSet:
        """The plan found, as a set of one; see :class:`planner.service.PlannerService`."""
        found = self._found.pop(request, None)
        if found is None:
            return self.otherwise.take(request, wait_seconds, ahead)
        if isinstance(found, NoPlanError):
            raise found
        self.statistics.plans += 1
        return PlanSet((found,))

    def corrections(self, request: int) -> Corrections | None:
        """See :class:`planner.service.PlannerService`; those of a plan of the file are not known."""
        return self.otherwise.corrections(request)

    def close(self) -> None:
        """End what plans otherwise."""
        self.otherwise.close()

    def _match(self, request: PlanRequest) -> Plan | None:
        found = [
            (self._uses[i], i, plan)
            for i, given in enumerate(self.file.plans)
            if _trains_as(given, request.training)
            and (plan := fitted(given, self.model, request.loads, self.shapes)) is not None
        ]
        if not found:
            return None
        _, i, plan = min(found, key=lambda entry: entry[:2])
        self._uses[i] += 1
        return plan


def fitted(
    plan: Plan, model: MultimodalModel, loads: Sequence[Microbatch], shapes: PayloadShapes | OperationShapes
) -> Plan | None:
    """The plan with this batch's payload shapes, if its units are a way to cut the batch; None if they are not, or if
    the plan has payload shapes of its own and they are others."""
    if not _cuts(plan.graph.units, model, plan.graph.modules, loads):
        return None
    expected = payloads(plan.graph, tuple(loads), shapes)
    if not plan.payloads:
        return replace(plan, payloads=expected)
    same = all(
        plan.payload(key[0], key[1], rank) == payload
        for key, payload in expected.items()
        for rank in ([key[2]] if len(key) > 2 else range(plan.graph.ranks))
    )
    return plan if same else None


def _cuts(
    units: Sequence[Unit], model: MultimodalModel, modules: Sequence[ModalityModule], loads: Sequence[Microbatch]
) -> bool:
    """Whether the units are all instances of all microbatches, each once, and feed what reads them."""
    upstream = {m.name: m.upstream for m in modules}
    shapes = {m.name: m for m in model.modules}
    slices: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for unit in units:
        slices.setdefault((unit.microbatch, unit.module), []).append((unit.first, unit.count))
    expected = 0
    for number, load in enumerate(loads):
        for name in upstream:
            instances = load.instances(shapes[name]) if name in shapes else 1
            mine = sorted(slices.get((number, name), []))
            ends = [0, *(first + count for first, count in mine)]
            if ends[-1] != instances or any(first != end for (first, _), end in zip(mine, ends, strict=False)):
                return False
            expected += len(mine)
    if expected != len(units):
        return False  # units of microbatches that there aren't
    for unit in units:
        clips = bool(loads[unit.microbatch].clips)
        downstream = {
            v.id for v in units
            if v.microbatch == unit.microbatch and unit.module in upstream[v.module]
            and (not clips or (unit.first < v.first + v.count and v.first < unit.first + unit.count))
        }  # fmt: skip
        if downstream != set(unit.downstream):
            return False
    return True


def in_words(model: MultimodalModel, loads: Sequence[Microbatch]) -> str:
    """What a batch holds, for people: ``2 microbatches: tokens 128 128, vision instances 3 0``."""
    words = [f"tokens {' '.join(str(load.tokens) for load in loads)}"]
    words += [
        f"{shape.name} instances {' '.join(str(load.instances(shape)) for load in loads)}"
        for shape in model.modules
        if shape.input != "text"
    ]
    return f"{len(loads)} microbatch{'es' * (len(loads) > 1)}: {', '.join(words)}"
