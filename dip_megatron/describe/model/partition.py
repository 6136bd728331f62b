"""How a model is cut: which layers each chunk holds, and the size of each module's sub-microbatches.

DIP's segments of one module each, modules that stand whole on every rank, and the stages of Megatron's own pipelines,
which hold layers of several modules, are three choices of the same chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from .faults import ModelError
from .modules import MultimodalModel


@dataclass(frozen=True)
class LayerRun:
    """Consecutive layers of one module on one chunk: ``layers`` of them from number ``first``, after the module's stem
    and before its head where these are set."""

    module: str
    layers: int
    first: int = 0
    stem: bool = False
    head: bool = False

    @property
    def numbers(self) -> range:
        """Of its layers, from 0 in the module."""
        return range(self.first, self.first + self.layers)


Chunk = tuple[LayerRun, ...]
"""The layers that a rank holds of one segment, in the order in which they run."""

MODEL = "model"
"""The name in graphs and plans of all modules that run as one, in stages that mix them."""


@dataclass(frozen=True)
class ModulePartition:
    """``layers[segment][rank]`` layers on each chunk, consecutive in that order; the stem stands on the first chunk,
    the head on the last. ``unit_size`` is B_i, the most instances a sub-microbatch holds (None: whole microbatches).
    ``replicated``: the module stands whole on every rank, ``layers[0][rank]`` being all of its layers, and each of its
    units runs on one of them.

    ``runs[segment][rank]`` are the layers of chunks that hold several modules' (empty: those of ``module`` alone);
    :meth:`of_stages` makes them. ``reversed[segment]``: it runs from the last rank to the first (empty: none does)."""

    module: str
    layers: tuple[tuple[int, ...], ...]
    unit_size: int | None = None
    replicated: bool = False
    runs: tuple[tuple[Chunk, ...], ...] = ()
    reversed: tuple[bool, ...] = ()

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

    @staticmethod
    def of_stages(stages: Sequence[Sequence[LayerRun]], ranks: int, *, turned: bool = False) -> ModulePartition:
        """All modules of a model as one, cut into ``stages``, in the order in which a microbatch passes them.

        Segment k holds stages k * ranks .. k * ranks + ranks - 1, on ranks 0 .. ranks - 1, or the other way round in
        the second segment of ``turned`` ones. ``first`` of the runs is filled in. Raises ModelError unless the stages
        are a multiple of the ranks.
        """
        if not stages or len(stages) % ranks:
            raise ModelError(f"stages: {len(stages)} virtual stages, expected a multiple of the {ranks} ranks")
        done: dict[str, int] = {}
        chunks: list[Chunk] = []
        for stage in stages:
            line: list[LayerRun] = []
            for run in stage:
                line.append(replace(run, first=done.get(run.module, 0)))
                done[run.module] = line[-1].numbers.stop
            chunks.append(tuple(line))
        segments = len(stages) // ranks
        back = tuple(turned and k == 1 for k in range(segments))
        rows = [tuple(chunks[k * ranks : (k + 1) * ranks]) for k in range(segments)]
        runs = tuple(row[::-1] if flip else row for row, flip in zip(rows, back, strict=True))
        layers = tuple(tuple(sum(run.layers for run in chunk) for chunk in line) for line in runs)
        return ModulePartition(MODEL, layers, runs=runs, reversed=back if any(back) else ())

    @property
    def mixed(self) -> bool:
        """Whether chunks hold layers of several modules, or may."""
        return bool(self.runs)

    @cached_property
    def chunks(self) -> tuple[tuple[Chunk, ...], ...]:
        """The layers of each chunk, ``[segment][rank]``."""
        if self.runs:
            return self.runs
        last = (self.segments - 1, len(self.layers[0]) - 1)
        return tuple(
            tuple(
                (LayerRun(self.module, n, self.first_layer[k][r], stem=self.replicated or (k, r) == (0, 0),
                          head=self.replicated or (k, r) == last),)
                for r, n in enumerate(counts)
            )
            for k, counts in enumerate(self.layers)
        )  # fmt: skip

    @property
    def stages(self) -> tuple[Chunk, ...]:
        """The chunks in the order in which a microbatch passes them."""
        lines = (line[::-1] if self.runs_back(k) else line for k, line in enumerate(self.chunks))
        return tuple(chunk for line in lines for chunk in line)

    def runs_back(self, segment: int) -> bool:
        """Whether a segment runs from the last rank to the first."""
        return self.reversed[segment] if self.reversed else False

    def layers_of(self, module: str) -> tuple[tuple[int, ...], ...]:
        """Layers of one of the model's modules on each chunk, ``[segment][rank]``."""
        return tuple(
            tuple(sum(run.layers for run in chunk if run.module == module) for chunk in line) for line in self.chunks
        )

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
    """One :class:`ModulePartition` per module, in the model's order, or a single one of stages that mix them;
    ``reasons`` say in words why it is as it is. ``schedule``: the static schedule that stages were chosen for, and
    ``group`` its microbatch group size, as Megatron has it (None: the schedule's usual one)."""

    modules: tuple[ModulePartition, ...]
    reasons: tuple[str, ...] = field(default=(), compare=False)
    schedule: str = ""
    group: int | None = None

    @property
    def ranks(self) -> int:
        return len(self.modules[0].layers[0])

    @property
    def mixed(self) -> bool:
        """Whether chunks hold layers of several modules, or may."""
        return any(m.mixed for m in self.modules)

    def by_module(self, model: MultimodalModel) -> Partition | None:
        """The same chunks as a partition by modules, where there is nothing to mix: a model of one module, none of
        whose segments is reversed. None for any other."""
        if not self.mixed:
            return self
        part = self.modules[0]
        if len(model.modules) > 1 or part.reversed:
            return None
        return Partition((ModulePartition(model.modules[0].name, part.layers),))

    @cached_property
    def _by_name(self) -> dict[str, ModulePartition]:
        return {m.module: m for m in self.modules}

    def module(self, name: str) -> ModulePartition:
        return self._by_name[name]

    def explain(self) -> str:
        """The partition and its reasons in words, one statement a line."""
        lines = []
        for m in self.modules:
            if m.mixed:
                stages = " | ".join(" + ".join(map(_in_words, stage)) for stage in m.stages)
                lines.append(f"{m.segments} stage{'s' * (m.segments > 1)} a rank: {stages}")
                continue
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
        if self.mixed:
            _check_stages(self.modules, model)
            return
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


def _in_words(run: LayerRun) -> str:
    return f"{'stem ' * run.stem}{run.layers} {run.module}{' head' * run.head}"


def _check_stages(parts: Sequence[ModulePartition], model: MultimodalModel) -> None:
    """Raises ModelError unless the stages are exactly the model, each module in order, on its pipeline ranks."""
    if len(parts) > 1:
        raise ModelError("modules: stages that mix modules must hold all of the model")
    (part,), ranks = parts, model.parallel.pp
    if len(part.layers[0]) != ranks:
        raise ModelError(f"stages: {len(part.stages)} virtual stages, expected a multiple of the {ranks} ranks")
    done = {m.name: 0 for m in model.modules}
    stems, heads = dict.fromkeys(done, 0), dict.fromkeys(done, 0)
    for v, stage in enumerate(part.stages):
        for run in stage:
            if run.stem and done[run.module]:
                raise ModelError(f"stages[{v}]: the stem of {run.module} must come before its layers")
            done[run.module] += run.layers
            stems[run.module] += run.stem
            heads[run.module] += run.head
            if run.head and done[run.module] != model.module(run.module).layers:
                raise ModelError(f"stages[{v}]: the head of {run.module} must come after its layers")
    for m in model.modules:
        if done[m.name] != m.layers or stems[m.name] != 1 or heads[m.name] != 1:
            raise ModelError(
                f"stages: {m.name} has {done[m.name]} of {m.layers} layers, "
                f"{stems[m.name]} stems and {heads[m.name]} heads; expected all layers and one of each"
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
