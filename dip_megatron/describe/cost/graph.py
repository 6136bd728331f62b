"""Stage graphs: one iteration's units on a partitioned model, priced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ...core import ModalityModule, OperationGraph, Unit
from ...core.graph import Floats
from ...core.modules import trained_before
from ..model import Chunk, LayerRun, ModulePartition, ModuleShape, MultimodalModel, Partition, Training
from ..workload import Microbatch, WorkloadError, partition_units, place_units
from .calibration import Costs
from .chunks import ChunkCost, CostModel, Kind
from .hardware import Cluster
from .parts import LayerCost
from .sizes import Sizes, unit_sizes
from .strategies import Counts

_FIELDS = ("forward", "backward", "weight", "activation", "deferred_activation", "fused")


@lru_cache(maxsize=16)
def cost_model(model: MultimodalModel, cluster: Cluster, costs: Costs | None = None) -> CostModel:
    """The cost model for these arguments; equal ones share one, and with it the caches."""
    return CostModel(model, cluster, costs)


def build_graph(
    model: MultimodalModel,
    cluster: Cluster,
    partition: Partition,
    microbatches: Sequence[Microbatch],
    *,
    costs: Costs | None = None,
    memory_limit: float | Sequence[float] | None = None,
) -> OperationGraph:
    """The stages of one iteration on the chunks of a partition.

    ``memory_limit`` in bytes, for all ranks or each; None: the costs' own, or what the cluster's GPUs can use. Raises
    ModelError if the partition doesn't fit the model, WorkloadError if a module meets a microbatch it can't process.
    """
    return priced_graph(cost_model(model, cluster, costs), partition, microbatches, memory_limit)


def priced_graph(
    pricer: CostModel,
    partition: Partition,
    microbatches: Sequence[Microbatch],
    memory_limit: float | Sequence[float] | None = None,
    training: Training | None = None,
) -> OperationGraph:
    """:func:`build_graph` with a cost model of one's own (other strategies, another number of candidates), and of a
    model that trains as ``training`` says (None: as it is described). Chunks that mix modules are priced as described
    also where ``training`` is known, which then says only what has a backward."""
    model = pricer.model
    partition.check(model)
    if not microbatches:
        raise WorkloadError("microbatches: an iteration needs at least one")
    ranks = model.parallel.pp
    units = partition_units(model, microbatches, partition)
    modules = tuple(_module(part, model, training) for part in partition.modules)
    reached = trained_before(modules)
    first_virtual_microbatch = np.cumsum([0] + [partition.module(u.module).segments for u in units])
    virtual_microbatches = int(first_virtual_microbatch[-1])
    costs: list[tuple[Counts, int, ChunkCost]] = []
    transfer = np.zeros(virtual_microbatches)
    sizes: dict[str, Sizes] = {}
    built: dict[LayerRun, ModuleShape] = {}
    for part in partition.modules:
        mine = [u for u in units if u.module == part.module]
        whole, here = _sizes(part, model, microbatches, mine)
        sizes |= here
        if not mine:
            continue
        first = first_virtual_microbatch[[u.id for u in mine]]
        layers: dict[CostModel, dict[Kind, LayerCost]] = {}
        priced: dict[tuple[CostModel, Chunk], ChunkCost] = {}
        trained = None if training is None or part.mixed else training.of_module(part.module)
        for k, seconds in enumerate(_transfers(pricer, part, here, whole, mine, microbatches)):
            transfer[first + k] = seconds
        for k, line in enumerate(part.chunks):
            for rank, chunk in enumerate(line):
                own = pricer
                if trained is not None:
                    built[chunk[0]] = trained[k][rank].of_shape(model.module(part.module))
                    own = pricer.as_built(part.module, trained[k][rank], reached[part.module][k][rank])
                same = own, tuple(_anywhere(model, run) for run in chunk)
                if same not in priced:
                    priced[same] = own.chunk_cost(same[1], here, layers.setdefault(own, {}))
                costs.append((first + k, rank, priced[same]))
    arrays, names = _fill(virtual_microbatches, ranks, costs)
    units = _placed(partition, units, arrays, first_virtual_microbatch)
    ranked = [[line[rank] for part in partition.modules for line in part.chunks] for rank in range(ranks)]
    static = [s.total for s in pricer.static(ranked, sizes, built)]
    return _graph(pricer, modules, units, arrays, names, transfer, static, memory_limit)


def _anywhere(model: MultimodalModel, run: LayerRun) -> LayerRun:
    """A run that costs the same: equal layers do wherever they stand, unless kinds of layers alternate."""
    shape = model.module(run.module)
    return run if shape.taps or len(set(shape.kinds)) > 1 else replace(run, first=0)


def _members(part: ModulePartition, model: MultimodalModel) -> list[ModuleShape]:
    """The model's modules that a module of the graph is made of."""
    return list(model.modules) if part.mixed else [model.module(part.module)]


def _sizes(
    part: ModulePartition, model: MultimodalModel, microbatches: Sequence[Microbatch], units: Sequence[Unit]
) -> tuple[dict[str, Sizes], dict[str, Sizes]]:
    """Sizes of the units for each module that is part of them: of all their instances, and of the ones that a rank of
    a stage has. Where modules are mixed, a unit is a microbatch and no rank shares its instances."""
    whole, here = {}, {}
    for shape in _members(part, model):
        where = [
            (u.microbatch, 0, microbatches[u.microbatch].instances(shape)) if part.mixed
            else (u.microbatch, u.first, u.count)
            for u in units
        ]  # fmt: skip
        whole[shape.name] = here[shape.name] = unit_sizes(shape, microbatches, where)
        shared = 1 if part.mixed else shape.sharing(model.parallel)
        if shared > 1:
            here[shape.name] = unit_sizes(shape, microbatches, where, shared)
    return whole, here


def _transfers(
    pricer: CostModel,
    part: ModulePartition,
    here: Mapping[str, Sizes],
    whole: Mapping[str, Sizes],
    units: Sequence[Unit],
    microbatches: Sequence[Microbatch],
) -> Iterator[Floats]:
    """Seconds from rank to rank of one segment after the other, ``[U]``: what each chunk's last layers hand on, and
    what taps have made so far and later layers need. A virtual microbatch has one transfer time, the mean over its
    stages, which keeps the sum along a microbatch's way."""
    message = np.zeros(len(units))
    ranks = len(part.layers[0])
    for k in range(part.segments):
        messages = []
        for chunk in part.stages[k * ranks : (k + 1) * ranks]:
            if chunk:  # a stage without layers passes on what it got
                message = _message(pricer, part, chunk[-1], here, whole, units, microbatches)
            messages.append(message)
        seconds = [pricer.transfer_seconds(m) for m in messages]
        alike = all(np.array_equal(m, messages[0]) for m in messages)
        yield seconds[0] if alike else np.sum(seconds, axis=0) / ranks


def _message(
    pricer: CostModel,
    part: ModulePartition,
    run: LayerRun,
    here: Mapping[str, Sizes],
    whole: Mapping[str, Sizes],
    units: Sequence[Unit],
    microbatches: Sequence[Microbatch],
) -> Floats:
    """Bytes that a chunk which ends with ``run`` hands on, ``[U]``."""
    shape = pricer.model.module(run.module)
    outputs = whole[run.module].outputs
    # What leaves a module that stands whole is all of it that travels.
    size = pricer.tap_bytes(shape, outputs) if part.replicated else pricer.message_bytes(shape, here[run.module])
    done = run.numbers.stop
    if shape.taps:
        size = size + shape.tapped(0, done) * pricer.tap_bytes(shape, outputs)
    for source in (pricer.model.module(name) for name in shape.upstream):
        if source.taps and shape.input == "text":
            encoded = np.array([sum(microbatches[u.microbatch].encoded.get(source.input, ())) for u in units])
            size = size + len(source.taps[done:]) * pricer.tap_bytes(source, encoded.astype(np.float64))
    return size


def _placed(
    partition: Partition, units: tuple[Unit, ...], arrays: dict[str, Floats],
    first_virtual_microbatch: NDArray[np.int64],
) -> tuple[Unit, ...]:  # fmt: skip
    """The units, with a rank for each of a replicated module; its stages on other ranks cost nothing any more."""
    work = arrays["forward"][0] + arrays["backward"][0] + arrays["weight"][0]
    placed = list(units)
    rows = {name: [u.id for u in units if u.module == name] for name in (m.module for m in partition.modules)}
    whole = [m.module for m in partition.modules if m.replicated]
    taken = np.zeros(len(work), dtype=np.bool_)
    taken[[first_virtual_microbatch[i] for name in whole for i in rows[name]]] = True
    others = work[~taken].sum(axis=0)
    for name in whole:
        here = first_virtual_microbatch[rows[name]]
        ranks = place_units(work[here, 0].tolist(), others)
        for unit, row, rank in zip(rows[name], here.tolist(), ranks, strict=True):
            placed[unit] = replace(units[unit], rank=rank)
            others[rank] += work[row, 0]
            for values in arrays.values():
                values[:, row, np.arange(values.shape[2]) != rank] = 0.0
    return tuple(placed)


def _trains(shape: ModuleShape, run: LayerRun) -> bool:
    """Whether the run has weight gradients."""
    return (
        (run.layers > 0 and "layers" in shape.trainable)
        or (run.stem and "stem" in shape.trainable)
        or (run.head and "head" in shape.trainable)
    )


def _module(part: ModulePartition, model: MultimodalModel, training: Training | None) -> ModalityModule:
    shapes = _members(part, model)
    names = [shape.name for shape in shapes]
    upstream = tuple(dict.fromkeys(name for shape in shapes for name in shape.upstream if name not in names))
    if training is not None:
        trains = training.trainable(part.module)
    else:
        trains = tuple(
            tuple(any(_trains(model.module(run.module), run) for run in chunk) for chunk in line)
            for line in part.chunks
        )
        trains = () if all(map(all, trains)) else trains
    return ModalityModule(part.module, part.layers, upstream, trains, part.reversed, part.replicated)


def _fill(
    virtual_microbatches: int,
    ranks: int,
    costs: Sequence[tuple[Counts, int, ChunkCost]],
) -> tuple[dict[str, Floats], tuple[tuple[tuple[str, ...], ...], ...]]:
    """Chunk costs (virtual microbatches, rank, cost) as arrays ``[C, S, P]``; chunks with fewer candidates repeat their
    last."""
    count = max(cost.forward.shape[0] for _, _, cost in costs)
    arrays = {name: np.empty((count, virtual_microbatches, ranks)) for name in _FIELDS}
    names: list[list[tuple[str, ...]]] = [[()] * ranks for _ in range(virtual_microbatches)]
    for index, rank, cost in costs:
        have = cost.forward.shape[0]
        for name in _FIELDS:
            values = getattr(cost, name)
            arrays[name][:have, index, rank] = values
            arrays[name][have:, index, rank] = values[-1]
        for virtual_microbatch, text in zip(index.tolist(), cost.names, strict=True):
            names[virtual_microbatch][rank] = text + text[-1:] * (count - have)
    return arrays, tuple(tuple(line) for line in names)


def _graph(
    pricer: CostModel,
    modules: tuple[ModalityModule, ...],
    units: tuple[Unit, ...],
    arrays: dict[str, Floats],
    names: tuple[tuple[tuple[str, ...], ...], ...],
    transfer: Floats,
    static: Sequence[float],
    memory_limit: float | Sequence[float] | None,
) -> OperationGraph:
    ranks = pricer.model.parallel.pp
    if pricer.costs.static_bytes:
        if len(pricer.costs.static_bytes) != ranks:
            raise ValueError(
                f"static_bytes: {len(pricer.costs.static_bytes)} ranks in the costs, the model has {ranks}"
            )
        static = pricer.costs.static_bytes
    if memory_limit is None:
        memory_limit = pricer.costs.memory_limit or pricer.cluster.usable_bytes
    between = pricer.cluster.between_operations

    def operation(seconds: Floats) -> Floats:
        """With what follows it, unless there is none."""
        return np.where(seconds > 0, seconds + between, 0.0) if between else seconds

    return OperationGraph(
        ranks=ranks,
        modules=modules,
        units=units,
        forward=operation(arrays["forward"]),
        backward=operation(arrays["backward"]),
        weight=operation(arrays["weight"]),
        fused=operation(arrays["fused"]),
        activation=arrays["activation"],
        deferred_activation=arrays["deferred_activation"],
        transfer=transfer,
        static_bytes=np.array(static, dtype=np.float64),
        memory_limit=np.broadcast_to(np.asarray(memory_limit, dtype=np.float64), (ranks,)).copy(),
        strategies=names,
        overhead=(between,) * ranks if between else (),
    )
