"""How a model is cut: each module's layers over ranks and segments, and the size of its sub-microbatches."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from .faults import ModelError
from .modules import MultimodalModel


@dataclass(frozen=True)
class ModulePartition:
    """``layers[segment][rank]`` layers on each chunk, consecutive in that order; the stem stands on the first chunk,
    the head on the last. ``unit_size`` is B_i, the most instances a sub-microbatch holds (None: whole microbatches).
    ``replicated``: the module stands whole on every rank, ``layers[0][rank]`` being all of its layers, and each of its
    units runs on one of them."""

    module: str
    layers: tuple[tuple[int, ...], ...]
    unit_size: int | None = None
    replicated: bool = False

    def __post_init__(self) -> None:
        if not self.layers or any(len(row) != len(self.layers[0]) or not row for row in self.layers):
            raise ModelError(f"modules.{self.module}.layers: every segment needs the same number of ranks")
        if min(min(row) for row in self.layers) < 0:
            raise ModelError(f"modules.{self.module}.layers: a chunk can't have fewer than 0 layers")
        if self.unit_size is not None and self.unit_size < 1:
            raise ModelError(f"modules.{self.module}.unit_size: must be at least 1 or null, got {self.unit_size}")
        if self.replicated and (len(self.layers) > 1 or len(set(self.layers[0])) > 1):
            raise ModelError(f"modules.{self.module}.layers: a replicated module has all of its layers on every rank")

    @staticmethod
    def whole(module: str, layers: int, ranks: int, unit_size: int | None = None) -> ModulePartition:
        """A module of so many layers, replicated."""
        return ModulePartition(module, ((layers,) * ranks,), unit_size, replicated=True)

    @property
    def segments(self) -> int:
        return len(self.layers)

    @property
    def total(self) -> int:
        return self.layers[0][0] if self.replicated else sum(map(sum, self.layers))

    @cached_property
    def first_layer(self) -> tuple[tuple[int, ...], ...]:
        """Number of each chunk's first layer, ``[segment][rank]``."""
        if self.replicated:
            return ((0,) * len(self.layers[0]),)
        out, n = [], 0
        for row in self.layers:
            line = []
            for count in row:
                line.append(n)
                n += count
            out.append(tuple(line))
        return tuple(out)


@dataclass(frozen=True)
class Partition:
    """One :class:`ModulePartition` per module, in the model's order; ``reasons`` say in words why it is as it is."""

    modules: tuple[ModulePartition, ...]
    reasons: tuple[str, ...] = field(default=(), compare=False)

    @property
    def ranks(self) -> int:
        return len(self.modules[0].layers[0])

    @cached_property
    def _by_name(self) -> dict[str, ModulePartition]:
        return {m.module: m for m in self.modules}

    def module(self, name: str) -> ModulePartition:
        return self._by_name[name]

    def explain(self) -> str:
        """The partition and its reasons in words, one statement a line."""
        lines = []
        for m in self.modules:
            size = "whole microbatches" if m.unit_size is None else f"sub-microbatches of at most {m.unit_size}"
            if m.replicated:
                lines.append(f"{m.module}: {size}, all of its {m.total} layers on every rank.")
                continue
            passes = "one segment" if m.segments == 1 else f"{m.segments} segments"
            rows = "; ".join(" ".join(map(str, row)) for row in m.layers)
            lines.append(f"{m.module}: {size}, {passes}, layers per rank {rows}.")
        return "\n".join((*lines, *self.reasons))

    def check(self, model: MultimodalModel) -> None:
        """Raises ModelError if this does not cut exactly ``model``'s modules and layers over its pipeline ranks."""
        ours, theirs = [m.module for m in self.modules], [m.name for m in model.modules]
        if ours != theirs:
            raise ModelError(f"modules: the partition has {ours}, the model {theirs}")
        for part, shape in zip(self.modules, model.modules, strict=True):
            if part.total != shape.layers:
                raise ModelError(f"modules.{part.module}.layers: add up to {part.total}, the model has {shape.layers}")
            if len(part.layers[0]) != model.parallel.pp:
                raise ModelError(
                    f"modules.{part.module}.layers: {len(part.layers[0])} ranks, the model's pp is {model.parallel.pp}"
                )


def spread(layers: int, segments: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """``layers`` over ``segments x ranks`` chunks as evenly as integers allow, the shorter chunks spread apart."""
    chunks = segments * ranks
    counts = [layers * (i + 1) // chunks - layers * i // chunks for i in range(chunks)]
    return tuple(tuple(counts[k * ranks : (k + 1) * ranks]) for k in range(segments))


def even_partition(
    model: MultimodalModel, segments: dict[str, int] | None = None, unit_size: dict[str, int | None] | None = None
) -> Partition:
    """Layers spread evenly, without a look at costs: one segment and whole microbatches where nothing is given."""
    segments, unit_size = segments or {}, unit_size or {}
    return Partition(
        tuple(
            ModulePartition(m.name, spread(m.layers, segments.get(m.name, 1), model.parallel.pp), unit_size.get(m.name))
            for m in model.modules
        )
    )
