"""B_i: how many instances a module should process at a time (section 1 of the paper, offline part)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ...core.graph import Floats
from ..cost import CostModel, Sizes
from ..cost.sizes import instance_sizes
from ..model import ModuleShape
from ..workload import Microbatch

EFFICIENCY_SHARE = 0.95


@dataclass(frozen=True)
class UnitSize:
    """``size`` (None: whole microbatches), the share of the best efficiency it keeps, and the most instances there
    are."""

    size: int | None
    share: float
    most: int


def mean_instance(module: ModuleShape, microbatches: Sequence[Microbatch]) -> tuple[Sizes | None, int]:
    """The mean instance of a module over all microbatches (None if there is none), and the most of one microbatch."""
    rows = [instance_sizes(module, m) for m in microbatches if m.instances(module)]
    if not rows:
        return None, 0
    mean = np.concatenate(rows).mean(axis=0)
    return Sizes(*(np.array([x]) for x in mean)), max(len(r) for r in rows)


def times(instance: Sizes, counts: Sequence[int]) -> Sizes:
    """Units of ``counts`` equal instances."""
    factor = np.asarray(counts, dtype=np.float64)
    return Sizes(*(getattr(instance, f.name)[0] * factor for f in fields(Sizes)))


def module_seconds(pricer: CostModel, module: str, sizes: Sizes) -> Floats:
    """Forward and backward seconds of the whole module, stem and head included, nothing recomputed, ``[U]``."""
    shape = pricer.model.module(module)
    total = np.zeros(len(sizes))
    for part in (pricer.stem(module, sizes), pricer.head(module, sizes)):
        total += part.forward + part.backward + part.weight
    for kind in sorted(set(shape.kinds)):
        layer = pricer.layer(module, sizes, kind)
        total += shape.kinds.count(kind) * (layer.forward[0] + layer.backward[0] + layer.weight[0])
    return total


def efficient_unit_size(
    pricer: CostModel, module: str, microbatches: Sequence[Microbatch], share: float = EFFICIENCY_SHARE
) -> UnitSize:
    """The smallest number of mean instances whose efficiency (instances a second) is at least ``share`` of the best.

    Whole microbatches where that is all of them, or where a microbatch is one instance (packed text).
    """
    shape = pricer.model.module(module)
    instance, most = mean_instance(shape, microbatches)
    if instance is None or most == 1:
        return UnitSize(None, 1.0, most)
    counts = np.arange(1, most + 1)
    most_of_rank = -(-counts // shape.sharing(pricer.model.parallel))  # the instances are taken to be equal
    efficiency = counts / module_seconds(pricer, module, times(instance, most_of_rank.tolist()))
    relative = efficiency / efficiency.max()
    size = int(counts[np.flatnonzero(relative >= share)[0]])
    return UnitSize(None if size == most else size, float(relative[size - 1]), most)
