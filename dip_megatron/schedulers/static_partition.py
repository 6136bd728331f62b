"""Static partitions of the whole model, modalities mixed, into virtual stages: by parameters and by latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.graph import Floats
from ..describe.cost import CostModel
from ..describe.model import LayerRun, MultimodalModel
from ..describe.workload import Microbatch

Stages = tuple[tuple[LayerRun, ...], ...]


@dataclass(frozen=True)
class Item:
    """The smallest piece of a model that a cut can't go through: a stem, one layer, or a head."""

    module: str
    part: str


def chain(model: MultimodalModel) -> tuple[Item, ...]:
    """All pieces in the order of the pipeline: module after module, each stem, layers, head."""
    return tuple(
        Item(m.name, part)
        for m in model.modules
        for part, count in (("stem", 1), ("layer", m.layers), ("head", 1))
        for _ in range(count)
    )


def item_parameters(model: MultimodalModel) -> Floats:
    """Parameters of each piece of :func:`chain`."""
    counts: list[int] = []
    for shape in model.modules:
        hidden = shape.layer.hidden
        layers = [sum(shape.layer_parameters(i)) for i in range(shape.layers)]
        counts += [shape.stem.parameters(hidden), *layers, sum(shape.head_parameters)]
    return np.array(counts, dtype=np.float64)


def item_seconds(pricer: CostModel, microbatches: Sequence[Microbatch]) -> Floats:
    """Mean seconds (forward and backward, nothing recomputed) of each piece of :func:`chain` over the microbatches."""
    sizes = pricer.mixed_sizes(microbatches)
    seconds: list[float] = []
    for shape in pricer.model.modules:
        here = sizes[shape.name]
        stem, head = pricer.stem(shape.name, here), pricer.head(shape.name, here)
        priced = {kind: pricer.layer(shape.name, here, kind) for kind in set(shape.kinds)}
        per_kind = {
            kind: float(np.mean(cost.forward[0] + cost.backward[0] + cost.weight)) for kind, cost in priced.items()
        }
        seconds.append(float(np.mean(stem.forward + stem.backward + stem.weight)))
        seconds += [per_kind[kind] for kind in shape.kinds]
        seconds.append(float(np.mean(head.forward + head.backward + head.weight)))
    return np.array(seconds)


def least_maximum(weights: Floats, parts: int) -> tuple[int, ...]:
    """Sizes of ``parts`` runs of consecutive weights whose greatest sum is the least possible (exact, by dynamic
    programming); of equal ones, the sum of squares over the runs is the least. Needs at least one weight a part."""
    count = len(weights)
    if not 1 <= parts <= count:
        raise ValueError(f"{count} pieces can't be cut into {parts} stages")
    prefix = np.concatenate([[0.0], np.cumsum(weights)])
    worst = np.full((parts + 1, count + 1), np.inf)
    square = np.full((parts + 1, count + 1), np.inf)
    cut = np.zeros((parts + 1, count + 1), dtype=int)
    worst[0, 0] = square[0, 0] = 0.0
    for k in range(1, parts + 1):
        for end in range(k, count - (parts - k) + 1):
            starts = np.arange(k - 1, end)
            last = prefix[end] - prefix[starts]
            value, total = np.maximum(worst[k - 1, starts], last), square[k - 1, starts] + last**2
            best = int(np.lexsort((total, np.round(value, 12)))[0])
            worst[k, end], square[k, end], cut[k, end] = value[best], total[best], starts[best]
    sizes, end = [], count
    for k in range(parts, 0, -1):
        start = int(cut[k, end])
        sizes.append(end - start)
        end = start
    return tuple(reversed(sizes))


def stage_rank(stage: int, ranks: int, turned: bool) -> int:
    """The rank that holds a virtual stage: Megatron's interleaved placement, or the V of ZB-V."""
    segment, place = divmod(stage, ranks)
    return ranks - 1 - place if turned and segment % 2 else place


def balance_ranks(weights: Floats, sizes: Sequence[int], ranks: int, turned: bool) -> tuple[int, ...]:
    """Move pieces from stage to stage, one at a time, as long as that lowers the greatest total of a rank, or evens out
    the totals below it: in the steady state it is the rank's total that sets the pace, not the greatest stage."""
    stages = len(sizes)
    prefix = np.concatenate([[0.0], np.cumsum(weights)])
    holds = np.zeros((stages, ranks))
    holds[np.arange(stages), [stage_rank(v, ranks, turned) for v in range(stages)]] = 1.0
    givers, takers = np.nonzero(~np.eye(stages, dtype=bool))
    moves = np.zeros((len(givers), stages), dtype=int)
    moves[np.arange(len(givers)), givers] = -1
    moves[np.arange(len(givers)), takers] = 1

    def worth(candidates: NDArray[np.int64]) -> tuple[Floats, Floats]:
        ends = np.cumsum(candidates, axis=1)
        seconds = prefix[ends] - prefix[ends - candidates]
        totals = seconds @ holds
        return np.round(totals.max(axis=1), 12), (totals**2).sum(axis=1) + 1e-3 * (seconds**2).sum(axis=1)

    best = np.array(sizes)
    value = tuple(float(v[0]) for v in worth(best[None]))
    while stages > 1:
        candidates = best + moves
        candidates = candidates[candidates.min(axis=1) >= 1]
        if not len(candidates):
            break
        greatest, spread = worth(candidates)
        i = int(np.lexsort((spread, greatest))[0])
        found = (float(greatest[i]), float(spread[i]))
        if found >= value:
            break
        best, value = candidates[i], found
    return tuple(int(n) for n in best)


def stages_of(model: MultimodalModel, sizes: Sequence[int]) -> Stages:
    """The virtual stages whose pieces are the next ``sizes[v]`` of :func:`chain`."""
    items, stages, start = chain(model), [], 0
    for size in sizes:
        runs: list[LayerRun] = []
        for item in items[start : start + size]:
            run = runs.pop() if runs and runs[-1].module == item.module else LayerRun(item.module, 0)
            runs.append(
                LayerRun(
                    item.module, run.layers + (item.part == "layer"), stem=run.stem or item.part == "stem",
                    head=run.head or item.part == "head",
                )
            )  # fmt: skip
        stages.append(tuple(runs))
        start += size
    return tuple(stages)


def parameter_balanced(model: MultimodalModel, segments: int) -> Stages:
    """V segments of virtual stages with as equal parameters as whole layers allow: the paper's Megatron baseline."""
    return stages_of(model, least_maximum(item_parameters(model), segments * model.parallel.pp))


def latency_balanced(
    seconds: Floats, model: MultimodalModel, segments: int, *, turned: bool = False, memory_weight: float = 0.0
) -> tuple[Stages, ...]:
    """The partitions into V segments that a careful engineer would try: the exact least maximum over virtual stages of
    the mean latencies ``seconds`` (one per piece of :func:`chain`; stems, heads and loss included), and from there the
    least greatest total of a rank. ``memory_weight`` counts parameters too, as a share of the model's: where the layers
    that are fast hold most parameters, balanced latencies alone overfill a rank."""
    ranks = model.parallel.pp
    weights = _with_memory(seconds, model, memory_weight)
    even = least_maximum(weights, segments * ranks)
    balanced = balance_ranks(weights, even, ranks, turned)
    return tuple(stages_of(model, sizes) for sizes in dict.fromkeys((even, balanced)))


def encoders_whole(
    seconds: Floats, model: MultimodalModel, segments: int, memory_weight: float = 0.0
) -> tuple[Stages, ...]:
    """:func:`latency_balanced` where all modules before the last one stand whole on the first stage, with the last
    one's stem, and the layers behind them make up for it."""
    ranks, first = model.parallel.pp, _encoder_pieces(model) + 1
    weights = _with_memory(seconds, model, memory_weight)
    joined = np.concatenate([[weights[:first].sum()], weights[first:]])
    if len(joined) < segments * ranks:
        return ()
    even = least_maximum(joined, segments * ranks)
    balanced = balance_ranks(joined, even, ranks, False)
    return tuple(stages_of(model, (sizes[0] + first - 1, *sizes[1:])) for sizes in dict.fromkeys((even, balanced)))


def encoders_apart(seconds: Floats, model: MultimodalModel, memory_weight: float = 0.0) -> tuple[Stages, ...]:
    """One stage a rank, none of which holds both pieces of the last module and of those before it: for each number of
    ranks that the others may have, both sides cut to their least maximum."""
    ranks, first = model.parallel.pp, _encoder_pieces(model)
    weights = _with_memory(seconds, model, memory_weight)
    return tuple(
        stages_of(model, (*least_maximum(weights[:first], k), *least_maximum(weights[first:], ranks - k)))
        for k in range(1, ranks)
        if k <= first and ranks - k <= len(weights) - first
    )


def _encoder_pieces(model: MultimodalModel) -> int:
    """Pieces of :func:`chain` before the last module."""
    return sum(m.layers + 2 for m in model.modules[:-1])


def _with_memory(seconds: Floats, model: MultimodalModel, memory_weight: float) -> Floats:
    parameters = item_parameters(model)
    weights: Floats = seconds / seconds.sum() + memory_weight * parameters / parameters.sum()
    return weights
