"""Sub-microbatches: microbatches cut into the units that the schedule orders (section 1 of the paper, online part)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...core import Unit
from ..model import MultimodalModel, Partition
from .batch import Microbatch


def even_slices(count: int, size: int | None) -> tuple[tuple[int, int], ...]:
    """``count`` instances in ceil(count / size) slices whose sizes differ by at most one: (first, length) of each.

    ``size`` None: one slice. No instances: no slice.
    """
    if count == 0:
        return ()
    parts = 1 if size is None else -(-count // size)
    short, longer = divmod(count, parts)
    slices, first = [], 0
    for i in range(parts):
        length = short + (i < longer)
        slices.append((first, length))
        first += length
    return tuple(slices)


def make_units(
    model: MultimodalModel, microbatches: Sequence[Microbatch], unit_size: Mapping[str, int | None]
) -> tuple[Unit, ...]:
    """Units of one iteration, microbatch by microbatch, upstream modules first; ids are positions.

    A module without instances in a microbatch (a ViT of a text-only one) has no unit there. A unit feeds the downstream
    units of its own microbatch: all of them, or, where both modules count clips, those that share a clip with it.
    """
    units: list[Unit] = []
    shapes = {m.name: m for m in model.modules}
    for number, microbatch in enumerate(microbatches):
        start = len(units)
        for shape in model.modules:
            size = unit_size.get(shape.name)
            for first, count in even_slices(microbatch.instances(shape), size):
                units.append(Unit(len(units), shape.name, number, first, count))
        here = units[start:]
        for unit in here:
            downstream = tuple(
                other.id
                for other in here
                if unit.module in shapes[other.module].upstream and (not microbatch.clips or _overlap(unit, other))
            )
            units[unit.id] = Unit(unit.id, unit.module, unit.microbatch, unit.first, unit.count, downstream)
    return tuple(units)


def partition_units(
    model: MultimodalModel, microbatches: Sequence[Microbatch], partition: Partition
) -> tuple[Unit, ...]:  # fmt: skip
    """:func:`make_units` as a partition sizes them; whole microbatches where its chunks mix modules."""
    if not partition.mixed:
        return make_units(model, microbatches, {m.module: m.unit_size for m in partition.modules})
    (part,) = partition.modules
    return tuple(Unit(number, part.module, number) for number in range(len(microbatches)))


def _overlap(a: Unit, b: Unit) -> bool:
    return a.first < b.first + b.count and b.first < a.first + a.count
