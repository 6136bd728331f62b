"""Stage graphs: one iteration's units on a partitioned model, priced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from ..model import ModuleShape, MultimodalModel, Partition
from ..schedule import ModalityModule, StageGraph, Unit
from ..schedule.graph import Floats
from ..workload import Microbatch, WorkloadError, make_units
from .calibration import Costs
from .chunks import Chunk, ChunkCost, CostModel, LayerRun
from .hardware import Cluster
from .parts import LayerCost
from .sizes import unit_sizes
from .strategies import Counts

_FIELDS = ("forward", "backward", "weight", "activation", "hold")


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
) -> StageGraph:
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
) -> StageGraph:
    """:func:`build_graph` with a cost model of one's own (other strategies, another number of candidates)."""
    model = pricer.model
    partition.check(model)
    if not microbatches:
        raise WorkloadError("microbatches: an iteration needs at least one")
    ranks = model.parallel.pp
    units = make_units(model, microbatches, {m.module: m.unit_size for m in partition.modules})
    modules = tuple(_module(pricer, partition, shape) for shape in model.modules)
    first_row = np.cumsum([0] + [partition.module(u.module).segments for u in units])
    rows = int(first_row[-1])
    chunks = {m.name: _chunks(partition, m) for m in model.modules}
    costs: list[tuple[Counts, int, ChunkCost]] = []
    hop = np.zeros(rows)
    sizes = {}
    for shape in model.modules:
        mine = [u for u in units if u.module == shape.name]
        sizes[shape.name] = unit_sizes(shape, microbatches, [(u.microbatch, u.first, u.count) for u in mine])
        if not mine:
            continue
        here = {shape.name: sizes[shape.name]}
        first = first_row[[u.id for u in mine]]
        layers: dict[tuple[str, bool], LayerCost] = {}
        priced: dict[Chunk, ChunkCost] = {}
        message = pricer.hop_seconds(pricer.message_bytes(shape, sizes[shape.name]))
        for k, line in enumerate(chunks[shape.name]):
            hop[first + k] = message
            for rank, run in enumerate(line):
                # Chunks of equal layers cost the same, wherever they stand, unless kinds of layers alternate.
                same = (run if shape.layer.window else replace(run, first=0),)
                if same not in priced:
                    priced[same] = pricer._chunk(same, here, layers)
                costs.append((first + k, rank, priced[same]))
    arrays, names = _fill(rows, ranks, costs)
    ranked = [[(line[rank],) for m in model.modules for line in chunks[m.name]] for rank in range(ranks)]
    static = [s.total for s in pricer.static(ranked, sizes)]
    return _graph(pricer, modules, units, arrays, names, hop, static, memory_limit)


def build_mixed_graph(
    model: MultimodalModel,
    cluster: Cluster,
    stages: Sequence[Sequence[LayerRun]],
    microbatches: Sequence[Microbatch],
    *,
    costs: Costs | None = None,
    memory_limit: float | Sequence[float] | None = None,
) -> StageGraph:
    """One module ``model`` of V segments whose chunks mix modalities, one unit per microbatch: what a static pipeline
    does.

    ``stages[segment * P + rank]`` lists the layers of each virtual stage; ``first`` of the runs is filled in from their
    order. All layers must be given, with each stem on its module's first run and each head on its last.
    """
    return mixed_graph(cost_model(model, cluster, costs), stages, microbatches, memory_limit)


def mixed_graph(
    pricer: CostModel,
    stages: Sequence[Sequence[LayerRun]],
    microbatches: Sequence[Microbatch],
    memory_limit: float | Sequence[float] | None = None,
) -> StageGraph:
    """:func:`build_mixed_graph` with a cost model of one's own."""
    model, ranks = pricer.model, pricer.model.parallel.pp
    if not stages or len(stages) % ranks:
        raise ValueError(f"stages: {len(stages)} virtual stages, expected a multiple of the {ranks} ranks")
    if not microbatches:
        raise WorkloadError("microbatches: an iteration needs at least one")
    segments = len(stages) // ranks
    chunks = _numbered(model, stages)
    sizes = pricer.mixed_sizes(microbatches)
    units = tuple(Unit(i, "model", i) for i in range(len(microbatches)))
    trains = [
        any(
            (run.layers > 0 and "layers" in t) or (run.stem and "stem" in t) or (run.head and "head" in t)
            for run in chunk
            for t in [model.module(run.module).trainable]
        )
        for chunk in chunks
    ]
    grid = [range(k * ranks, (k + 1) * ranks) for k in range(segments)]
    module = ModalityModule(
        "model",
        tuple(tuple(sum(run.layers for run in chunks[v]) for v in row) for row in grid),
        (),
        () if all(trains) else tuple(tuple(trains[v] for v in row) for row in grid),
    )
    first = np.arange(len(microbatches)) * segments
    layers: dict[tuple[str, bool], LayerCost] = {}
    costs: list[tuple[Counts, int, ChunkCost]] = []
    messages: list[Floats] = []
    for v, chunk in enumerate(chunks):
        cost = pricer._chunk(chunk, sizes, layers) if chunk else _empty(len(units))
        costs.append((first + v // ranks, v % ranks, cost))
        # What crosses the border: the states of the module in progress; a stage without layers passes on what it got.
        last = model.module(chunk[-1].module) if chunk else None
        if last is not None:
            messages.append(pricer.message_bytes(last, sizes[last.name]))
        else:
            messages.append(messages[-1] if messages else np.zeros(len(units)))
    hop = np.zeros(len(microbatches) * segments)
    for k, row in enumerate(grid):
        hop[first + k] = np.mean([pricer.hop_seconds(messages[v]) for v in row], axis=0)
    arrays, names = _fill(len(hop), ranks, costs)
    ranked = [[chunks[v] for v in range(rank, len(chunks), ranks)] for rank in range(ranks)]
    static = [s.total for s in pricer.static(ranked, sizes)]
    return _graph(pricer, (module,), units, arrays, names, hop, static, memory_limit)


def _empty(units: int) -> ChunkCost:
    zero = np.zeros((1, units))
    return ChunkCost(zero, zero, zero, zero, zero, (("none",),) * units)


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


def _chunks(partition: Partition, shape: ModuleShape) -> list[list[LayerRun]]:
    part = partition.module(shape.name)
    last = (part.segments - 1, len(part.layers[0]) - 1)
    return [
        [
            LayerRun(shape.name, n, part.first_layer[k][r], stem=(k, r) == (0, 0), head=(k, r) == last)
            for r, n in enumerate(row)
        ]
        for k, row in enumerate(part.layers)
    ]


def _module(pricer: CostModel, partition: Partition, shape: ModuleShape) -> ModalityModule:
    runs = _chunks(partition, shape)
    trainable = tuple(
        tuple(
            (run.layers > 0 and "layers" in shape.trainable)
            or (run.stem and "stem" in shape.trainable)
            or (run.head and "head" in shape.trainable)
            for run in row
        )
        for row in runs
    )
    layers = partition.module(shape.name).layers
    return ModalityModule(shape.name, layers, shape.upstream, () if all(map(all, trainable)) else trainable)


def _fill(
    rows: int,
    ranks: int,
    costs: Sequence[tuple[Counts, int, ChunkCost]],
) -> tuple[dict[str, Floats], tuple[tuple[tuple[str, ...], ...], ...]]:
    """Chunk costs (rows, rank, cost) as arrays ``[C, S, P]``; chunks with fewer candidates repeat their last."""
    count = max(cost.forward.shape[0] for _, _, cost in costs)
    arrays = {name: np.empty((count, rows, ranks)) for name in _FIELDS}
    names: list[list[tuple[str, ...]]] = [[()] * ranks for _ in range(rows)]
    for index, rank, cost in costs:
        have = cost.forward.shape[0]
        for name in _FIELDS:
            values = getattr(cost, name)
            arrays[name][:have, index, rank] = values
            arrays[name][have:, index, rank] = values[-1]
        for row, text in zip(index.tolist(), cost.names, strict=True):
            names[row][rank] = text + text[-1:] * (count - have)
    return arrays, tuple(tuple(line) for line in names)


def _graph(
    pricer: CostModel,
    modules: tuple[ModalityModule, ...],
    units: tuple[Unit, ...],
    arrays: dict[str, Floats],
    names: tuple[tuple[tuple[str, ...], ...], ...],
    hop: Floats,
    static: Sequence[float],
    memory_limit: float | Sequence[float] | None,
) -> StageGraph:
    ranks = pricer.model.parallel.pp
    if pricer.costs.static_bytes:
        if len(pricer.costs.static_bytes) != ranks:
            raise ValueError(
                f"static_bytes: {len(pricer.costs.static_bytes)} ranks in the costs, the model has {ranks}"
            )
        static = pricer.costs.static_bytes
    if memory_limit is None:
        memory_limit = pricer.costs.memory_limit or pricer.cluster.usable_bytes
    return StageGraph(
        ranks=ranks,
        modules=modules,
        units=units,
        forward=arrays["forward"],
        backward=arrays["backward"],
        weight=arrays["weight"],
        fused=arrays["backward"] + arrays["weight"],
        activation=arrays["activation"],
        hold=arrays["hold"],
        hop=hop,
        static_bytes=np.array(static, dtype=np.float64),
        memory_limit=np.broadcast_to(np.asarray(memory_limit, dtype=np.float64), (ranks,)).copy(),
        strategies=names,
    )
