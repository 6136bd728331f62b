"""Seconds and bytes of model chunks: runs of layers on one rank, for many units at once, per memory strategy."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ...core.graph import Floats
from ...core.strategies import LayerStrategy, format_strategy, known_strategies
from ..model import Chunk, ChunkTraining, LanguageHead, LayerKind, LayerRun, ModuleShape, MultimodalModel, Parallel
from ..model.modules import TrainablePart
from ..workload import Microbatch
from .calibration import Costs, Part
from .hardware import Cluster
from .operators import Operators
from .parts import LayerCost, PartCost, head_cost, layer_cost, stem_cost, with_strategies
from .sizes import Sizes, whole_sizes
from .static import INBOX_MESSAGES, StaticBytes, run_bytes
from .strategies import Counts, combine, pick

_LEAST_SAVED = 0.01
_HIDDEN = 1.05  # times as long W may take for what it brings back from host memory
_TRAINABLE: dict[Part, TrainablePart] = {"stem": "stem", "layer": "layers", "head": "head", "stage": "layers"}


Kind = tuple[str, LayerKind]
"""A module and what a layer of it is."""
_USUAL = LayerKind()


@dataclass(frozen=True, eq=False)
class ChunkCost:
    """A chunk's cost under C memory strategies for U units: ``forward``, ``backward``, ``weight``, ``activation``,
    ``deferred_activation``, ``fused`` ``[C, U]``, fastest strategy first for every unit; ``names[u]`` are unit u's C
    strategies. ``fused``: seconds of an unsplit backward, the input gradient and, one after the other, the weight
    gradient as it is without a strategy."""

    forward: Floats
    backward: Floats
    weight: Floats
    activation: Floats
    deferred_activation: Floats
    fused: Floats
    names: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _Candidates:
    """Layers per kind of layer and strategy, ``[C, kinds, strategies]``, and the C names."""

    counts: Counts
    names: tuple[str, ...]


class CostModel:
    """The costs of one model on one cluster. Holds caches of what depends on chunks and rounded sizes only, so that one
    object should live as long as the model does. ``strategies`` are the names of the layer strategies that may be
    chosen (``none`` always may; None: all), ``candidates`` how many of their mixes a chunk gets at most (S in section
    2c of the paper), chosen with or without ``corners`` (:func:`.strategies.pick`)."""

    def __init__(
        self,
        model: MultimodalModel,
        cluster: Cluster,
        costs: Costs | None = None,
        *,
        strategies: Sequence[str] | None = None,
        candidates: int = 10,
        corners: bool = True,
    ) -> None:
        self.strategies: tuple[LayerStrategy, ...] = known_strategies()
        names = [s.name for s in self.strategies]
        allowed = names if strategies is None else strategies
        unknown = set(allowed) - set(names)
        if unknown:
            raise ValueError(f"unknown memory strategies {sorted(unknown)}; known: {', '.join(names)}")
        self.model = model
        self.costs = costs or Costs()
        self.cluster = self.costs.calibrate(cluster)
        self.operators = Operators(self.cluster, model.parallel.tp, model.parallel.cp)
        self._of_whole = Operators(self.cluster, 1, model.parallel.tp * model.parallel.cp)
        self.candidates, self.corners = candidates, corners
        self._allowed = np.array([name == "none" or name in allowed for name in names])
        self._full = names.index("full")
        self._instead = [(i, names.index(s.instead_of)) for i, s in enumerate(self.strategies) if s.instead_of]
        self._reached = _reached(model)
        self._cache: dict[tuple[Chunk, tuple[tuple[float, ...], ...]], _Candidates] = {}
        self._as_built: dict[tuple[Any, ...], CostModel] = {}

    def as_built(self, module: str, chunk: ChunkTraining, reached: bool) -> CostModel:
        """The costs of a chunk of ``module`` whose parameters train as ``chunk`` says; ``reached``: something before it
        in the model trains."""
        shape = chunk.of_shape(self.model.module(module))
        if shape == self.model.module(module) and reached == self._reached[module]:
            return self
        key = (module, shape.trainable, shape.trained_share, reached)
        if key not in self._as_built:
            other = copy.copy(self)
            modules = tuple(shape if m.name == module else m for m in self.model.modules)
            other.model = replace(self.model, modules=modules)
            other._reached, other._cache, other._as_built = self._reached | {module: reached}, {}, {}
            self._as_built[key] = other
        return self._as_built[key]

    # -- parts ---------------------------------------------------------------------------------------------------
    def part_alive(self, module: str, part: Part) -> bool:
        """Whether the part takes a backward: it trains, or something before it in the model does."""
        shape = self.model.module(module)
        before: tuple[str, ...] = {
            "stem": ("stem",), "layer": ("stem", "layers"), "stage": ("stem", "layers"),
            "head": ("stem", "layers", "head"),
        }[part]  # fmt: skip
        return self._reached[module] or any(p in shape.trainable for p in before)

    def _settle(self, shape: ModuleShape, part: Part, cost: PartCost, sizes: Sizes) -> PartCost:
        """Measured values in, and nothing for what frozen parts don't do."""
        cost = self.costs.adjust(shape.name, part, cost, sizes)
        zero = np.zeros(len(sizes))
        if not self.part_alive(shape.name, part):
            return PartCost(cost.forward, zero, zero, zero, zero)
        share = shape.share(_TRAINABLE[part])
        if not share:
            return PartCost(cost.forward, cost.backward, zero, cost.activation, zero)
        return replace(cost, weight=share * cost.weight)

    def _here(self, shape: ModuleShape, sizes: Sizes) -> tuple[Parallel, Operators, Sizes]:
        """Parallel sizes as the module sees them, the operators of one of its ranks, and what of units of these sizes
        that has."""
        parallel, operators = self.model.parallel, self.operators
        if shape.tensor_parallel != "split":
            parallel, operators = replace(parallel, tp=1, sequence_parallel=False), self._of_whole
        if shape.sharded:
            return parallel, operators, sizes.sharded(parallel.cp)
        return replace(parallel, cp=1), operators, sizes

    def stem(self, module: str, sizes: Sizes) -> PartCost:
        """The module's stem for units of the given sizes."""
        shape = self.model.module(module)
        parallel, operators, sizes = self._here(shape, sizes)
        return self._settle(shape, "stem", stem_cost(shape, parallel, operators, sizes), sizes)

    def head(self, module: str, sizes: Sizes) -> PartCost:
        """The module's head, loss included, for units of the given sizes; what ranks have made of their shares is
        gathered behind it."""
        shape = self.model.module(module)
        parallel, operators, sizes = self._here(shape, sizes)
        cost = head_cost(shape, parallel, operators, sizes)
        ranks = shape.sharing(self.model.parallel)
        if ranks > 1:
            apart = 1 if shape.tensor_parallel == "shared" else self.model.parallel.tp
            gathered = self.operators.gather(ranks * self.tap_bytes(shape, sizes.outputs), ranks, apart)
            cost = replace(cost, forward=cost.forward + gathered)
        return self._settle(shape, "head", cost, sizes)

    def layer(self, module: str, sizes: Sizes, kind: LayerKind = _USUAL) -> LayerCost:
        """One layer of the module, of a kind, under every layer strategy."""
        shape = self.model.module(module)
        parallel, operators, sizes = self._here(shape, sizes)
        layer = layer_cost(shape.layer, parallel, operators, sizes, kind)
        cost = self._settle(shape, "layer", layer.cost, sizes)
        if not self.part_alive(module, "layer"):
            zero = np.zeros((len(self.strategies), len(sizes)))
            return LayerCost(zero + cost.forward, zero, zero, zero, zero)
        # What is recomputed, dropped or kept for W is a share of the layer, also of a measured one.
        settled = replace(
            layer,
            cost=cost,
            recompute=layer.recompute * _ratio(cost.forward, layer.cost.forward),
            dropped=layer.dropped * _ratio(cost.activation, layer.cost.activation),
            weight_inputs=layer.weight_inputs * _ratio(cost.deferred_activation, layer.cost.deferred_activation),
        )
        return self.costs.adjust_strategies(module, with_strategies(operators, settled, self.strategies), sizes)

    def stage(self, module: str, sizes: Sizes) -> PartCost:
        """What a chunk with layers takes beside them: nothing unless it has been measured."""
        shape = self.model.module(module)
        sizes = self._here(shape, sizes)[-1]
        return self._settle(shape, "stage", PartCost.nothing(len(sizes)), sizes)

    # -- chunks --------------------------------------------------------------------------------------------------
    def mixed_sizes(self, microbatches: Sequence[Microbatch]) -> dict[str, Sizes]:
        """Sizes of whole microbatches for every module."""
        return {m.name: whole_sizes(m, microbatches) for m in self.model.modules}

    def chunk_cost(
        self, chunk: Chunk, sizes: Mapping[str, Sizes], layers: dict[Kind, LayerCost] | None = None
    ) -> ChunkCost:
        """Cost of a chunk for U units; ``sizes`` gives, per module of the chunk, what each unit holds for it;
        ``layers`` keeps the costs of layers for other chunks of the same units."""
        layers = {} if layers is None else layers
        units = len(next(iter(sizes.values())))
        if not chunk:
            zero = np.zeros((1, units))
            return ChunkCost(zero, zero, zero, zero, zero, zero, (("none",),) * units)
        kinds = self._kinds(chunk)
        for kind in kinds:
            if kind not in layers:
                layers[kind] = self.layer(kind[0], sizes[kind[0]], kind[1])
        fixed = self._fixed(chunk, sizes, units)
        found, group = self._classes(chunk, sizes, units)
        count = max(len(c.names) for c in found)
        # Layers per unit, candidate, kind of layer and strategy; groups with fewer candidates repeat their last.
        counts = np.stack([c.counts[np.minimum(np.arange(count), len(c.names) - 1)] for c in found])[group]
        texts = [c.names + c.names[-1:] * (count - len(c.names)) for c in found]
        out = {f.name: np.broadcast_to(getattr(fixed, f.name), (count, units)).copy() for f in fields(PartCost)}
        longer = {name: np.zeros((count, units)) for name in ("weight", "deferred_activation")}
        for k, kind in enumerate(kinds):
            layer = layers[kind]
            for name in ("forward", "backward", "activation"):
                out[name] += np.einsum("ucs,su->cu", counts[:, :, k], getattr(layer, name))
            for name, more in longer.items():
                each = getattr(layer, name)
                out[name] += counts[0, 0, k].sum() * each[0]
                more += np.einsum("ucs,su->cu", counts[:, :, k], each - each[0])
        fused = out["backward"] + out["weight"]
        for name, more in longer.items():
            out[name] += more
        return _fastest_first(ChunkCost(**out, fused=fused, names=tuple(texts[g] for g in group)))

    def _kinds(self, chunk: Chunk) -> list[Kind]:
        return list(dict.fromkeys(kind for run in chunk for kind in self._kinds_of(run)))

    def _kinds_of(self, run: LayerRun) -> list[Kind]:
        """Of each layer of a run."""
        kinds = self.model.module(run.module).kinds
        return [(run.module, kinds[i]) for i in run.numbers]

    def _fixed(self, chunk: Chunk, sizes: Mapping[str, Sizes], units: int) -> PartCost:
        total = PartCost.nothing(units)
        for run in chunk:
            heads = run.head + self.model.module(run.module).tapped(run.first, run.layers)
            for times, part in ((run.stem, self.stem), (heads, self.head), (run.layers > 0, self.stage)):
                if times:
                    more = part(run.module, sizes[run.module])
                    total = PartCost(
                        *(getattr(total, f.name) + times * getattr(more, f.name) for f in fields(PartCost))
                    )  # fmt: skip
        return total

    def _classes(self, chunk: Chunk, sizes: Mapping[str, Sizes], units: int) -> tuple[list[_Candidates], Counts]:
        """Units grouped by rounded size: the candidates of each group, and the group of each unit, ``[U]``. Chunks of
        several modules get one group, judged at the mean size."""
        modules = tuple(dict.fromkeys(run.module for run in chunk))
        if len(modules) == 1:
            table = sizes[modules[0]].rounded().table()
            keys, group = np.unique(table, axis=0, return_inverse=True)
            return [self._candidates(chunk, modules, (tuple(key),)) for key in keys.tolist()], group.reshape(units)
        means = tuple(tuple(sizes[m].mean().rounded().table()[0].tolist()) for m in modules)
        return [self._candidates(chunk, modules, means)], np.zeros(units, dtype=np.int64)

    def _candidates(self, chunk: Chunk, modules: tuple[str, ...], keys: tuple[tuple[float, ...], ...]) -> _Candidates:
        found = self._cache.get((chunk, keys))
        if found is None:
            found = self._cache[chunk, keys] = self._find_candidates(chunk, dict(zip(modules, keys, strict=True)))
        return found

    def _find_candidates(self, chunk: Chunk, keys: dict[str, tuple[float, ...]]) -> _Candidates:
        kinds = self._kinds(chunk)
        place = [kinds.index(kind) for run in chunk for kind in self._kinds_of(run)]
        parts, offered = [], []
        for k, (module, own) in enumerate(kinds):
            layer = self.layer(module, Sizes.of(np.array([keys[module]])), own)
            seconds, size = layer.forward[:, 0] + layer.backward[:, 0], layer.activation[:, 0]
            usable = self._allowed.copy()
            # Not worth offering: the attention core where attention is fused, which keeps next to nothing; and
            # offloading over links too slow for it, which saves a little more than recomputing and costs many times as
            # much.
            extra, saved = seconds - seconds[0], size[0] - size
            usable[1:] &= (saved[1:] >= _LEAST_SAVED * size[0]) & (
                (extra <= 2 * extra[self._full]) | ~self._allowed[self._full]
            )[1:]
            for alike, plain in self._instead:
                hidden = usable[alike] and layer.weight[alike, 0] <= _HIDDEN * layer.weight[plain, 0]
                usable[plain if hidden else alike] = False
            offered.append(np.flatnonzero(usable))
            parts.append((place.count(k), seconds[usable], size[usable]))
        found, seconds, size = combine(parts)
        chosen = pick(seconds, size, self.candidates, corners=self.corners)
        counts = np.zeros((len(chosen), len(kinds), len(self.strategies)), dtype=np.int64)
        for k, table in enumerate(found):
            counts[:, k, offered[k]] = table[chosen]
        return _Candidates(counts, tuple(_name(place, line, self.strategies) for line in counts))

    # -- memory and messages -------------------------------------------------------------------------------------
    def static(
        self,
        chunks: Sequence[Sequence[Chunk]],
        sizes: Mapping[str, Sizes],
        built: Mapping[LayerRun, ModuleShape] | None = None,
    ) -> tuple[StaticBytes, ...]:
        """What each rank holds all the time, ``chunks[rank]`` being its chunks, for units of at most the given sizes;
        ``built``: shapes of the chunks' runs as built, where they aren't the model's."""
        workspace = {m.name: self._workspace(m, sizes[m.name]) for m in self.model.modules if len(sizes[m.name])}
        inbox = 0.0
        if self.model.parallel.pp > 1:
            largest = [float(self.message_bytes(self.model.module(m), sizes[m]).max()) for m in workspace]
            inbox = INBOX_MESSAGES * max(largest, default=0.0)
        out = []
        for line in chunks:
            total = StaticBytes(inbox=inbox)
            for run in (run for chunk in line for run in chunk):
                shape = (built or {}).get(run) or self.model.module(run.module)
                taps = shape.tapped(run.first, run.layers)
                total = total.plus(run_bytes(self.model, self.cluster, shape, run.numbers, run.stem, run.head + taps))
                layer, head = workspace.get(run.module, (0.0, 0.0))
                total = total.plus(StaticBytes(workspace=max(layer if run.layers else 0.0, head if run.head else 0.0)))
            out.append(total)
        return tuple(out)

    def _workspace(self, shape: ModuleShape, sizes: Sizes) -> tuple[float, float]:
        """Bytes for a moment beside what stages hold: all activations of one layer, where any may be made again or
        brought back, and an output head's logits."""
        parallel, operators, sizes = self._here(shape, sizes)
        layer = 0.0
        if np.count_nonzero(self._allowed) > 1:  # something may be recomputed or brought back
            layer = max(
                float(layer_cost(shape.layer, parallel, operators, sizes.largest(), kind).cost.activation.max())
                for kind in set(shape.kinds)
            )
        logits = 0.0
        if isinstance(shape.head, LanguageHead):
            width = (self.cluster.element_bytes + 4) * shape.head.vocabulary / parallel.tp
            logits = float(width * sizes.tokens.max())
        return layer, logits

    def message_bytes(self, shape: ModuleShape, sizes: Sizes) -> Floats:
        """Bytes a tensor-parallel rank hands to the next pipeline rank inside the module, ``[U]``: hidden states, and
        the condition that a DiT's later chunks read too."""
        parallel, _, sizes = self._here(shape, sizes)
        shard = parallel.tp if parallel.sequence_parallel else 1
        elements = shape.carried * sizes.tokens * shape.layer.hidden + sizes.condition * shape.layer.cross_attention
        return self.cluster.element_bytes * elements / shard

    def tap_bytes(self, shape: ModuleShape, outputs: Floats) -> Floats:
        """Bytes of what one tap of an encoder makes of ``outputs`` tokens: whole on every tensor-parallel rank."""
        return self.cluster.element_bytes * shape.output_width * outputs

    def transfer_seconds(self, message: Floats) -> Floats:
        """Seconds of one transfer of ``message`` bytes between neighbouring pipeline ranks."""
        if self.costs.transfer_seconds is not None:
            return np.full_like(message, self.costs.transfer_seconds)
        return self.operators.send(message, self.model.parallel.pp)


def _reached(model: MultimodalModel) -> dict[str, bool]:
    """Per module: something upstream of it trains."""
    reached: dict[str, bool] = {}
    for m in model.modules:
        reached[m.name] = any(reached[u] or bool(model.module(u).trainable) for u in m.upstream)
    return reached


def _ratio(measured: Floats, formula: Floats) -> Floats:
    return np.divide(measured, formula, out=np.ones_like(formula), where=formula > 0)


def _name(place: list[int], counts: Counts, strategies: Sequence[LayerStrategy]) -> str:
    """The strategy text of a chunk whose i-th layer is of kind ``place[i]``, with ``counts[kind, strategy]``."""
    order = sorted(range(len(strategies)), key=lambda i: strategies[i].place)
    queues = [[strategies[i].name for i in order for _ in range(int(line[i]))] for line in counts]
    taken = [0] * len(queues)
    names = []
    for kind in place:
        names.append(queues[kind][taken[kind]])
        taken[kind] += 1
    return format_strategy(names)


def _fastest_first(cost: ChunkCost) -> ChunkCost:
    """Candidates are chosen at rounded sizes: put each unit's own in order where that differs."""
    seconds = cost.forward + cost.backward
    wrong = np.flatnonzero((np.diff(seconds, axis=0) < -1e-12).any(axis=0))
    if not len(wrong):
        return cost
    order = np.argsort(seconds, axis=0, kind="stable")
    names = list(cost.names)
    for u in wrong:
        names[u] = tuple(names[u][c] for c in order[:, u])
    arrays = {name: np.take_along_axis(x, order, axis=0) for name, x in vars(cost).items() if name != "names"}
    return ChunkCost(**arrays, names=tuple(names))
