"""Stage graphs: one iteration's units on a partitioned model, priced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ...core import ModalityModule, OperationGraph, Unit
from ...core.graph import Floats
from ...core.modules import trained_before
from ..model import ModuleShape, MultimodalModel, Partition, Training
from ..workload import Microbatch, WorkloadError, make_units, place_units
from .calibration import Costs
from .chunks import Chunk, ChunkCost, CostModel, Kind, LayerRun
from .hardware import Cluster
from .parts import LayerCost
from .sizes import unit_sizes
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
    """The stages of one iteration of modality-segmented chunks.

    ``memory_limit`` in bytes, for all ranks or each; None: the costs' own, or what the cluster's GPUs can use. Raises
    ModelError if the partition doesn't fit the model, WorkloadError if a module meets a microbatch it can't process.
    """
    return segmented_graph(cost_model(model, cluster, costs), partition, microbatches, memory_limit)


def segmented_graph(
    pricer: CostModel,
    partition: Partition,
    microbatches: Sequence[Microbatch],
    memory_limit: float | Sequence[float] | None = None,
    training: Training | None = None,
) -> OperationGraph:
    """:func:`build_graph` with a cost model of one's own (other strategies, another number of candidates), and of a
    model that trains as ``training`` says (None: as it is described)."""
    model = pricer.model
    partition.check(model)
    if not microbatches:
        raise WorkloadError("microbatches: an iteration needs at least one")
    ranks = model.parallel.pp
    units = make_units(model, microbatches, {m.module: m.unit_size for m in partition.modules})
    modules = tuple(_module(partition, shape, training) for shape in model.modules)
    reached = trained_before(modules)
    first_virtual_microbatch = np.cumsum([0] + [partition.module(u.module).segments for u in units])
    virtual_microbatches = int(first_virtual_microbatch[-1])
    chunks = {m.name: _chunks(partition, m) for m in model.modules}
    costs: list[tuple[Counts, int, ChunkCost]] = []
    transfer = np.zeros(virtual_microbatches)
    sizes = {}
    built: dict[LayerRun, ModuleShape] = {}
    for shape in model.modules:
        mine = [u for u in units if u.module == shape.name]
        where = [(u.microbatch, u.first, u.count) for u in mine]
        whole = unit_sizes(shape, microbatches, where)
        ranks_share = shape.sharing(model.parallel)
        sizes[shape.name] = whole if ranks_share == 1 else unit_sizes(shape, microbatches, where, ranks_share)
        if not mine:
            continue
        here = {shape.name: sizes[shape.name]}
        first = first_virtual_microbatch[[u.id for u in mine]]
        layers: dict[CostModel, dict[Kind, LayerCost]] = {}
        priced: dict[tuple[CostModel, Chunk], ChunkCost] = {}
        trained = None if training is None else training.of_module(shape.name)
        message = pricer.message_bytes(shape, sizes[shape.name])
        if partition.module(shape.name).replicated:  # what leaves it is all that travels
            message = pricer.tap_bytes(shape, whole.outputs)
        for k, line in enumerate(chunks[shape.name]):
            transfer[first + k] = _transfer(pricer, shape, line, message, whole.outputs, mine, microbatches)
            for rank, run in enumerate(line):
                own = pricer
                if trained is not None:
                    built[run] = trained[k][rank].of_shape(shape)
                    own = pricer.as_built(shape.name, trained[k][rank], reached[shape.name][k][rank])
                # Chunks of equal layers cost the same, wherever they stand, unless kinds of layers alternate.
                same = (own, (run if shape.taps or len(set(shape.kinds)) > 1 else replace(run, first=0),))
                if same not in priced:
                    priced[same] = own._chunk(same[1], here, layers.setdefault(own, {}))
                costs.append((first + k, rank, priced[same]))
    arrays, names = _fill(virtual_microbatches, ranks, costs)
    units = _placed(partition, units, arrays, first_virtual_microbatch)
    ranked = [[(line[rank],) for m in model.modules for line in chunks[m.name]] for rank in range(ranks)]
    static = [s.total for s in pricer.static(ranked, sizes, built)]
    return _graph(pricer, modules, units, arrays, names, transfer, static, memory_limit)


def build_mixed_graph(
    model: MultimodalModel,
    cluster: Cluster,
    stages: Sequence[Sequence[LayerRun]],
    microbatches: Sequence[Microbatch],
    *,
    reversed: Sequence[bool] = (),
    costs: Costs | None = None,
    memory_limit: float | Sequence[float] | None = None,
) -> OperationGraph:
    """One module ``model`` of V segments whose chunks mix modalities, one unit per microbatch: what a static pipeline
    does.

    ``stages`` lists the layers of the V * P virtual stages in the order in which a microbatch passes them; ``first`` of
    the runs is filled in from there. Segment k holds stages k * P .. k * P + P - 1, on ranks 0 .. P - 1, or P - 1 .. 0
    where ``reversed[k]``. All layers must be given, each stem on its module's first run and each head on its last;
    ValueError says what is missing.
    """
    return mixed_graph(cost_model(model, cluster, costs), stages, microbatches, memory_limit, reversed)


def mixed_graph(
    pricer: CostModel,
    stages: Sequence[Sequence[LayerRun]],
    microbatches: Sequence[Microbatch],
    memory_limit: float | Sequence[float] | None = None,
    reversed: Sequence[bool] = (),
) -> OperationGraph:
    """:func:`build_mixed_graph` with a cost model of one's own."""
    model, ranks = pricer.model, pricer.model.parallel.pp
    if not stages or len(stages) % ranks:
        raise ValueError(f"stages: {len(stages)} virtual stages, expected a multiple of the {ranks} ranks")
    if not microbatches:
        raise WorkloadError("microbatches: an iteration needs at least one")
    segments, count = len(stages) // ranks, len(microbatches)
    chunks = _numbered(model, stages)
    sizes = pricer.mixed_sizes(microbatches)
    back = tuple(reversed) or (False,) * segments
    holder = [(v // ranks, ranks - 1 - v % ranks if back[v // ranks] else v % ranks) for v in range(len(stages))]
    layers_of, trains = [[0] * ranks for _ in range(segments)], [[True] * ranks for _ in range(segments)]
    ranked: list[list[Chunk]] = [[] for _ in range(ranks)]
    transfer = np.zeros(count * segments)
    first = np.arange(count) * segments
    priced: dict[Kind, LayerCost] = {}
    costs: list[tuple[Counts, int, ChunkCost]] = []
    message = np.zeros(count)
    for chunk, (k, rank) in zip(chunks, holder, strict=True):
        costs.append((first + k, rank, pricer._chunk(chunk, sizes, priced) if chunk else _empty(count)))
        layers_of[k][rank] = sum(run.layers for run in chunk)
        trains[k][rank] = any(_trains(model.module(run.module), run) for run in chunk)
        ranked[rank].append(chunk)
        if chunk:  # a stage without layers passes on what it got
            last = model.module(chunk[-1].module)
            message = pricer.message_bytes(last, sizes[last.name])
        # A virtual microbatch has one transfer time: the mean over its stages keeps the sum along a microbatch's way.
        transfer[first + k] += pricer.transfer_seconds(message) / ranks
    module = ModalityModule(
        "model",
        tuple(map(tuple, layers_of)),
        (),
        () if all(map(all, trains)) else tuple(map(tuple, trains)),
        back if any(back) else (),
    )
    units = tuple(Unit(i, "model", i) for i in range(count))
    arrays, names = _fill(len(transfer), ranks, costs)
    static = [s.total for s in pricer.static(ranked, sizes)]
    return _graph(pricer, (module,), units, arrays, names, transfer, static, memory_limit)


def _transfer(
    pricer: CostModel,
    shape: ModuleShape,
    line: Sequence[LayerRun],
    message: Floats,
    embedded: Floats,
    units: Sequence[Unit],
    microbatches: Sequence[Microbatch],
) -> Floats:
    """Seconds from rank to rank of one segment, ``[U]``: its messages, and what taps have made so far and later layers
    need, of ``embedded`` tokens where they are its own. A virtual microbatch has one transfer time, the mean over its
    stages."""
    sources = [(shape, embedded, 1)] if shape.taps else []
    for u in (pricer.model.module(name) for name in shape.upstream):
        if u.taps and shape.input == "text":
            outputs = np.array([sum(microbatches[unit.microbatch].encoded.get(u.input, ())) for unit in units])
            sources.append((u, outputs.astype(np.float64), 0))
    if not sources:
        return pricer.transfer_seconds(message)
    total = np.zeros_like(message)
    for run in line:
        bytes_ = message
        for source, outputs, encodes in sources:
            done = run.first + run.layers
            count = source.tapped(0, done) if encodes else len(source.taps[done:])
            bytes_ = bytes_ + count * pricer.tap_bytes(source, outputs)
        total += pricer.transfer_seconds(bytes_)
    return total / len(line)


def _empty(units: int) -> ChunkCost:
    zero = np.zeros((1, units))
    return ChunkCost(zero, zero, zero, zero, zero, zero, (("none",),) * units)


def _numbered(model: MultimodalModel, stages: Sequence[Sequence[LayerRun]]) -> list[Chunk]:
    """The stages with ``first`` filled in. Raises ValueError if they are not exactly the model, each module in
    order."""
    done = {m.name: 0 for m in model.modules}
    stems, heads = dict.fromkeys(done, 0), dict.fromkeys(done, 0)
    chunks = []
    for v, stage in enumerate(stages):
        line = []
        for run in stage:
            shape = model.module(run.module)
            if run.stem and done[run.module]:
                raise ValueError(f"stages[{v}]: the stem of {run.module} must come before its layers")
            line.append(replace(run, first=done[run.module]))
            done[run.module] += run.layers
            stems[run.module] += run.stem
            heads[run.module] += run.head
            if run.head and done[run.module] != shape.layers:
                raise ValueError(f"stages[{v}]: the head of {run.module} must come after its layers")
        chunks.append(tuple(line))
    for m in model.modules:
        if done[m.name] != m.layers or stems[m.name] != 1 or heads[m.name] != 1:
            raise ValueError(
                f"stages: {m.name} has {done[m.name]} of {m.layers} layers, "
                f"{stems[m.name]} stems and {heads[m.name]} heads; expected all layers and one of each"
            )
    return chunks


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


def _chunks(partition: Partition, shape: ModuleShape) -> list[list[LayerRun]]:
    part = partition.module(shape.name)
    if part.replicated:
        return [[LayerRun(shape.name, n, stem=True, head=True) for n in part.layers[0]]]
    last = (part.segments - 1, len(part.layers[0]) - 1)
    return [
        [
            LayerRun(shape.name, n, part.first_layer[k][r], stem=(k, r) == (0, 0), head=(k, r) == last)
            for r, n in enumerate(counts)
        ]
        for k, counts in enumerate(part.layers)
    ]


def _trains(shape: ModuleShape, run: LayerRun) -> bool:
    """Whether the run has weight gradients."""
    return (
        (run.layers > 0 and "layers" in shape.trainable)
        or (run.stem and "stem" in shape.trainable)
        or (run.head and "head" in shape.trainable)
    )


def _module(partition: Partition, shape: ModuleShape, training: Training | None) -> ModalityModule:
    part = partition.module(shape.name)
    layers, whole = part.layers, part.replicated
    if training is not None:
        return ModalityModule(
            shape.name, layers, shape.upstream, training.trainable(shape.name), replicated=whole
        )  # fmt: skip
    runs = _chunks(partition, shape)
    trainable = tuple(tuple(_trains(shape, run) for run in segment) for segment in runs)
    trains = () if all(map(all, trainable)) else trainable
    return ModalityModule(shape.name, layers, shape.upstream, trains, replicated=whole)


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
