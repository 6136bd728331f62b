"""Seconds and bytes of a program's parts, measured on a loop's own microbatches: whole iterations on one rank that
holds all of the model, run as the executor runs a plan.

Any family can be measured so, whatever its stages hand on to one another. Each module is cut into its stem, its layers
and its head, once with the layers in one chunk and once in two: what two take beyond one is what a stage costs by
itself, such as working out positions, which encoders of Megatron-Bridge do anew in every chunk.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core import Kind, Operation, OperationGraph, Plan, Schedule, Unit
from ..core.graph import Floats
from ..core.lower import make_plan
from ..describe.cost import Cluster, Costs, Table
from ..describe.cost.sizes import unit_sizes
from ..describe.model import ModulePartition, ModuleShape, MultimodalModel, Partition
from ..describe.workload import Microbatch
from ..families.family import Layers
from ..megatron.call import ScheduleCall
from ..megatron.iteration import Iteration
from ..planner.maker import payloads
from ..planner.model_graphs import ModelGraphs
from ..runtime.clock import Clock
from ..runtime.executor import Executor
from ..runtime.protocol import MicrobatchInputs, ModelProgram
from ..runtime.transport import DistributedTransport

UNIT_SIZES = (None, 2, 1)
"""Instances at a time that encoders are measured with."""
_QUANTITIES = {Kind.F: "forward", Kind.B: "backward", Kind.W: "weight"}

Build = Callable[[Layers], tuple[ModelProgram, list[torch.nn.Module]]]
"""Makes a rank's program of all of the model, cut as told, and its chunks as the loop wraps them."""


@dataclass(frozen=True)
class Measured:
    """One operation of a unit of so many tokens: seconds, and the bytes that a forward leaves for its backward (None of
    others, and where they weren't counted)."""

    module: str
    segment: int
    kind: Kind
    tokens: float
    seconds: float
    kept: int | None = None


class ProgramRun:
    """A model on one rank, each module's stem, layers and head chunks of their own, the layers in one or, ``halved``,
    in two. ``model`` describes it with one pipeline rank, ``forward_step`` is the loop's."""

    def __init__(
        self, build: Build, model: MultimodalModel, cluster: Cluster, forward_step: Callable[..., Any],
        device: torch.device, *, halved: bool = False,
    ):  # fmt: skip
        self._layers: Layers = {}
        for m in model.modules:
            last = _of_head(m)
            own = m.layers - last
            self._layers[m.name] = ((0,), *(((own // 2,), (own - own // 2,)) if halved else ((own,),)), (last,))
        self._model, self._cluster, self._forward_step = model, cluster, forward_step
        self.program, self.chunks = build(self._layers)
        self._clock = _CountingClock(device, self.chunks)
        self._executor = Executor(0, DistributedTransport([0], 0, device, 600.0), self._clock)

    def measure(
        self, inputs: Sequence[MicrobatchInputs], unit_size: int | None, *, count_bytes: bool = False
    ) -> list[Measured]:  # fmt: skip
        """An iteration of these microbatches, of which two are under way at any time, as in a pipeline; backwards in
        two where the layers can. Encoders take ``unit_size`` instances at a time (None: all). Counting bytes takes
        time, which is then measured, too."""
        loads = tuple(self.program.load(given) for given in inputs)
        graph = self._graph(loads, unit_size)
        tokens = self._tokens(graph, loads)
        plan = self._plan(graph, loads)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        call = ScheduleCall(
            forward_step_func=self._forward_step, data_iterator=None, model=self.chunks, num_microbatches=len(inputs)
        )
        iteration = Iteration(self.program, self._executor, plan, call, list(inputs))
        self._clock.begin()
        with self._clock.counting() if count_bytes else nullcontext():
            iteration.run(1)
        return [
            Measured(
                s.operation.module, s.operation.segment, s.operation.kind, tokens[s.operation.unit],
                s.end - s.start if s.core_seconds is None else s.core_seconds,
                self._clock.kept.get(s.operation) if count_bytes else None,
            )
            for s in self._clock.spans()
        ]  # fmt: skip

    def _graph(self, loads: tuple[Microbatch, ...], unit_size: int | None) -> OperationGraph:
        modules = tuple(
            ModulePartition(m.name, self._layers[m.name], None if m.input == "text" else unit_size)
            for m in self._model.modules
        )
        graphs = ModelGraphs(self._model, self._cluster, Partition(modules), recompute=False, offload=False)
        return graphs.build(loads, False)

    def _tokens(self, graph: OperationGraph, loads: tuple[Microbatch, ...]) -> dict[int, float]:
        found: dict[int, float] = {}
        for m in self._model.modules:
            mine = [u for u in graph.units if u.module == m.name]
            sizes = unit_sizes(
                m, loads, [(u.microbatch, u.first, u.count) for u in mine], m.sharing(self._model.parallel)
            )  # fmt: skip
            found |= {u.id: float(t) for u, t in zip(mine, sizes.tokens, strict=True)}
        return found

    def _plan(self, graph: OperationGraph, loads: tuple[Microbatch, ...]) -> Plan:
        count = graph.virtual_microbatches
        stages: list[list[int]] = [[] for _ in loads]
        modules = [m.name for m in graph.modules]
        units = [graph.units[i] for i in graph.unit_of.tolist()]
        # Chunk by chunk, so that none finds its data in the caches because the one before it has just left them there.
        for s in sorted(range(count), key=lambda s: (modules.index(units[s].module), graph.segment(s))):
            stages[units[s].microbatch].append(s)
        order: list[int] = []
        for number in range(len(loads) + 1):
            if number < len(loads):
                order += [int(Kind.F) * count + s for s in stages[number]]
            for s in reversed(stages[number - 1] if number else []):
                if graph.has_backward[s, 0]:
                    apart = bool(graph.has_weight[s, 0]) and self.program.supports_split
                    order.append(int(Kind.B if apart else Kind.BW) * count + s)
                    order += [int(Kind.W) * count + s] * apart
        schedule = Schedule((np.array(order, dtype=np.int32),), np.zeros((count, 1), dtype=np.int8))
        return make_plan(graph, schedule, lower_bound=0.0, payloads=payloads(graph, loads, self.program.shapes))


_Values = dict[tuple[str, int, str], dict[float, list[float]]]
"""Seconds, or bytes, of a module's segment and of a quantity, by tokens."""


def profile_program(
    whole: ProgramRun, halved: ProgramRun, model: MultimodalModel, inputs: Sequence[MicrobatchInputs], device: str, *,
    repeats: int = 5, progress: Callable[[str], None] = lambda _: None,
) -> Costs:  # fmt: skip
    """What stems, layers and heads of the model take and keep on ``inputs``, which are run whole and a few instances at
    a time: the content of a costs file.

    Seconds are medians over ``repeats``; where the host computes they are those that the thread had a core, so that
    other programs lengthen nothing. Where the layers can't leave weight gradients for later, all of a backward stands
    as that of the input. Raises what the program raises.
    """
    one: _Values = defaultdict(lambda: defaultdict(list))
    two: _Values = defaultdict(lambda: defaultdict(list))
    for run, values in ((whole, one), (halved, two)):
        for turn in range(repeats + 1):
            progress(f"turn {turn + 1} of {repeats + 1}")
            for unit_size in UNIT_SIZES:
                for m in run.measure(inputs, unit_size, count_bytes=not turn):
                    if m.kept is not None:
                        values[m.module, m.segment, "activation"][m.tokens].append(float(m.kept))
                    if not turn:  # it warms up
                        continue
                    values[m.module, m.segment, _QUANTITIES.get(m.kind, "backward")][m.tokens].append(m.seconds)
                    if m.kind == Kind.BW:
                        values[m.module, m.segment, "weight"][m.tokens].append(0.0)
    tables = []
    for shape in model.modules:
        for quantity in ("forward", "backward", "weight", "activation"):
            tables += _tables(shape, quantity, one, two)
    return Costs(tables=tuple(tables), device=device)


def _of_head(shape: ModuleShape) -> int:
    """Layers that stand with the head: multi-token prediction has its own as the last layer is."""
    return 1 if shape.mtp and shape.layers > 1 else 0


def _tables(shape: ModuleShape, quantity: str, one: _Values, two: _Values) -> list[Table]:
    """Of a module, whose segments are stem, layers and head in ``one``; in ``two`` its layers are halved."""
    module, last = shape.name, _of_head(shape)
    layers = shape.layers - last
    tokens = sorted(t for t in one.get((module, 1, quantity), {}) if t > 0)
    if not tokens:
        return []

    def medians(values: _Values, segment: int) -> Floats:
        found = values.get((module, segment, quantity), {})
        return np.array([statistics.median(found[t]) if found.get(t) else 0.0 for t in tokens])

    stem, whole, head = (medians(one, segment) for segment in range(3))
    own = np.zeros_like(whole)
    if layers > 1 and quantity != "activation":
        ends = [end for end in (stem, head) if end.any()]  # each of them is a stage, too
        own = (medians(two, 1) + medians(two, 2) - whole).clip(0.0, np.min(ends, axis=0) if ends else None)
    layer = (whole - own) / layers
    head = head - last * layer
    parts: tuple[tuple[Any, Floats, bool], ...] = (
        ("stage", own, bool(own.any())), ("stem", stem - own, (module, 0, quantity) in one),
        ("layer", layer, True), ("head", head - own, (module, 2, quantity) in one),
    )  # fmt: skip
    return [
        Table(module, part, quantity, tuple(tokens), tuple(values.clip(0.0).tolist()))
        for part, values, there in parts
        if there
    ]


class _CountingClock(Clock):
    """A clock that can also count what autograd saves in each forward: storage by storage, parameters left out."""

    def __init__(self, device: torch.device, chunks: Sequence[torch.nn.Module]):
        super().__init__(device)
        self._parameters = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}
        self._saved: dict[int, int] = {}
        self.kept: dict[Operation, int] = {}
        """bytes of each forward that ran while counting"""

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count within."""
        self.kept = {}
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
            yield

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def start(self) -> tuple[float, Any]:
        """An operation starts."""
        self._saved = {}
        return super().start()

    def stop(self, operation: Operation, unit: Unit, started: tuple[float, Any]) -> None:
        """It has ended."""
        super().stop(operation, unit, started)
        if operation.kind == Kind.F:
            self.kept[operation] = sum(self._saved.values())
