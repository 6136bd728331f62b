"""Stage graphs for tests and benchmarks: small ones of every shape, and large ones with the costs of real models."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from dip_megatron.core import ModalityModule, Operation, OperationGraph, Unit

GIB = float(2**30)


def smallest_need(graph: OperationGraph) -> np.ndarray:
    """Bytes each rank needs at least beside its static bytes, ``[P]``, when units form trees (as all graphs here do).

    All stages that lead to a sink unit are held at once when its last forward starts; a stage without backward is held
    only while it runs.
    """
    lean = np.maximum(graph.activation.min(axis=0), 0.0)
    need = np.where(graph.has_backward, 0.0, lean).max(axis=0, initial=0.0)
    upstream_units: dict[int, list[int]] = {u.id: [] for u in graph.units}
    for u in graph.units:
        for v in u.downstream:
            upstream_units[v].append(u.id)
    for u in graph.units:
        if u.downstream:
            continue
        seen, stack = {u.id}, [u.id]
        while stack:
            for q in upstream_units[stack.pop()]:
                if q not in seen:
                    seen.add(q)
                    stack.append(q)
        rows = [s for s in range(graph.virtual_microbatches) if int(graph.unit_of[s]) in seen]
        need = np.maximum(need, np.where(graph.has_backward, lean, 0.0)[rows].sum(axis=0))
    return need


def predecessors(graph: OperationGraph, operation: Operation) -> tuple[Operation, ...]:
    """The operations whose outputs ``operation`` reads."""
    inputs = graph.inputs(operation.kind, graph.virtual_microbatch_of(operation), operation.rank)
    return tuple(graph.operation(d.kind, d.virtual_microbatch, d.rank) for d in inputs)


def with_memory(graph: OperationGraph, factor: float) -> OperationGraph:
    """The same graph with ``factor`` times the smallest need of every rank as its limit (inf: no limit)."""
    limit = np.full(graph.ranks, np.inf) if np.isinf(factor) else graph.static_bytes + np.ceil(
        factor * smallest_need(graph)
    )  # fmt: skip
    return replace(graph, memory_limit=limit)


def random_graph(
    seed: int,
    *,
    ranks: int | None = None,
    microbatches: int | None = None,
    max_units: int = 3,
    max_segments: int = 2,
    candidates: int | None = None,
    memory: float | None = None,
    integer: bool = False,
    frozen: bool | None = None,
) -> OperationGraph:
    """A drawn graph. ``memory`` is the limit over the smallest need (None: drawn, inf: no limit).

    Shapes: one module; encoder(s) into a backbone; a backbone into a generator with one or several units; a chain of
    three. Durations are about 1 ms to 20 ms, whole milliseconds with ``integer``; rows, ranks and microbatches differ.
    """
    rng = np.random.default_rng(seed)
    ranks = ranks or int(rng.integers(1, 5))
    microbatches = microbatches or int(rng.integers(1, 5))
    candidates = candidates or int(rng.choice([1, 1, 2, 3]))
    shape = int(rng.integers(0, 5))
    shapes: list[list[tuple[str, tuple[str, ...]]]] = [
        [("text", ())],
        [("vision", ()), ("text", ("vision",))],
        [("vision", ()), ("audio", ()), ("text", ("vision", "audio"))],
        [("text", ()), ("video", ("text",))],
        [("vision", ()), ("text", ("vision",)), ("video", ("text",))],
    ]
    chains = shapes[shape]
    freeze = bool(rng.random() < 0.3) if frozen is None else frozen
    modules = []
    turning = bool(rng.random() < 0.15)
    for name, upstream in chains:
        segments = int(rng.integers(1, max_segments + 1))
        layers = tuple(tuple(int(x) for x in rng.integers(1, 4, ranks)) for _ in range(segments))
        trainable: tuple[tuple[bool, ...], ...] = ()
        if freeze and not upstream and len(chains) > 1:
            trained_end = bool(rng.random() < 0.5)
            trainable = tuple(
                tuple(trained_end and k == segments - 1 and r == ranks - 1 for r in range(ranks))
                for k in range(segments)
            )
        turned = tuple(bool(x) for x in rng.random(segments) < 0.5) if turning else ()
        modules.append(ModalityModule(name, layers, upstream, trainable, turned))
    placing = np.random.default_rng((seed, 1))  # of its own, so that all other graphs stay as they were
    copied = ranks > 1 and chains[0][0] == "vision" and bool(placing.random() < 0.3)
    if copied:
        trains = tuple((modules[0].trains(modules[0].segments - 1, ranks - 1),) * ranks for _ in range(1))
        modules[0] = ModalityModule("vision", ((2,) * ranks,), (), () if all(trains[0]) else trains, (), True)
        # What all ranks encode goes to the first one, where its readers begin.
        modules[1:] = [
            replace(m, reversed=(False, *m.reversed[1:])) if "vision" in m.upstream and m.reversed else m
            for m in modules[1:]
        ]
    units: list[Unit] = []
    for m in range(microbatches):
        members: dict[str, list[int]] = {}
        sizes = {}
        for name, upstream in chains:
            readers = [n for n, up in chains if name in up]
            if not upstream and readers and readers[0] == "text":
                count = int(rng.integers(0, max_units + 1))
            elif name == "video":
                count = int(rng.integers(1, max_units + 1))
            else:
                count = 1
            sizes[name] = count
        first = len(units)
        for name, _ in chains:
            members[name] = list(range(first, first + sizes[name]))
            first += sizes[name]
        for name, _ in chains:
            downstream = tuple(v for n, up in chains if name in up for v in members[n])
            units.extend(
                Unit(
                    i, name, m, j, 1, downstream, int(placing.integers(ranks)) if copied and name == "vision" else None
                )
                for j, i in enumerate(members[name])
            )
    module_of = {m.name: m for m in modules}
    rows = sum(module_of[u.module].segments for u in units)
    speed = {m.name: float(rng.uniform(2.0, 12.0)) for m in modules}
    base = np.zeros((rows, ranks))
    s = 0
    for u in units:
        size = rng.uniform(0.4, 1.6)
        for k in range(module_of[u.module].segments):
            base[s] = speed[u.module] * size * np.array(module_of[u.module].layers[k]) / 2.0
            s += 1
    base *= rng.uniform(0.9, 1.1, base.shape)

    def seconds(x: np.ndarray) -> np.ndarray:
        return np.maximum(1.0, np.round(x)) * 1e-3 if integer else x * 1e-3

    slow = 1.0 + np.arange(candidates)[:, None, None] * rng.uniform(0.2, 0.6)
    forward = seconds(np.repeat(base[None], candidates, axis=0))
    backward = seconds(base[None] * slow * rng.uniform(0.9, 1.2))
    weight = seconds(np.repeat(base[None] * rng.uniform(0.7, 1.0), candidates, axis=0))
    fused = (backward + weight) * (1.0 if integer else rng.uniform(0.92, 1.0))
    lean = np.linspace(1.0, 0.25, candidates)[:, None, None] if candidates > 1 else np.ones((1, 1, 1))
    held = np.round(base * rng.uniform(0.5, 1.5, (rows, 1)) * 1e8)
    activation = np.round(held[None] * lean)
    deferred_activation = np.round(np.repeat(held[None], candidates, axis=0) * rng.uniform(0.2, 0.7))
    transfer = np.round(rng.uniform(0, 2.0, rows)) * 1e-3 if integer else rng.uniform(0, 5e-4, rows)
    if rng.random() < 0.3:
        transfer = np.zeros(rows)
    graph = OperationGraph(
        ranks=ranks,
        modules=tuple(modules),
        units=tuple(units),
        forward=forward,
        backward=backward,
        weight=weight,
        fused=fused,
        activation=activation,
        deferred_activation=deferred_activation,
        transfer=transfer,
        static_bytes=np.round(rng.uniform(1e9, 2e9, ranks)),
        memory_limit=np.full(ranks, np.inf),
    )
    for array in (forward, backward, weight, fused, activation, deferred_activation):
        array[:, graph.is_idle] = 0.0
    # Frozen chunks have no weight gradient to pay for.
    frozen_mask = ~graph.has_weight[None] | np.zeros_like(weight, dtype=bool)
    weight[frozen_mask] = 0.0
    fused[frozen_mask] = backward[frozen_mask]
    deferred_activation[frozen_mask] = 0.0
    if memory is None:
        memory = float(rng.choice([1.0, 1.05, 1.3, 1.7, 2.5, np.inf]))
    return with_memory(graph, memory)


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper as costs: seconds of a forward per rank for one full unit, bytes it holds, and shape."""

    ranks: int
    modules: tuple[tuple[str, int, float, float], ...]  # name, segments, forward seconds of the whole module, GiB held
    images: tuple[int, int]
    unit_images: int
    budget_gib: float


PAPER_MODELS = {
    "vlm-s": PaperModel(4, (("vision", 1, 0.0152, 0.75), ("text", 1, 0.074, 17.0)), (0, 48), 12, 54.0),
    "vlm-m": PaperModel(4, (("vision", 1, 0.0076, 0.40), ("text", 2, 0.148, 26.0)), (0, 48), 12, 36.0),
    "vlm-l": PaperModel(8, (("vision", 1, 0.0335, 0.60), ("text", 1, 0.333, 40.0)), (0, 48), 10, 44.0),
    "t2v-s": PaperModel(4, (("text", 1, 0.074, 17.0), ("video", 1, 0.042, 6.0)), (1, 8), 2, 50.0),
    "t2v-l": PaperModel(8, (("text", 1, 0.148, 26.0), ("video", 1, 0.126, 8.0)), (1, 8), 2, 40.0),
}
"""Forward seconds are per image (vision), per 8192 packed tokens (text) and per clip of two seconds (video)."""


def paper_graph(
    name: str, seed: int = 0, *, microbatches: int = 16, ranks: int | None = None, limited: bool = True,
    candidates: int = 3,
) -> OperationGraph:  # fmt: skip
    """A graph with the sizes of one of the paper's models and a drawn batch of packed, mixed data."""
    model = PAPER_MODELS[name]
    ranks = ranks or model.ranks
    rng = np.random.default_rng((seed, len(name), microbatches))
    modules, shares = [], {}
    for i, (module, segments, _, _) in enumerate(model.modules):
        upstream = (model.modules[0][0],) if i else ()
        share = np.ones((segments, ranks))
        share[-1, -1] += 0.05 * (i == len(model.modules) - 1)
        shares[module] = share * rng.uniform(0.99, 1.01, share.shape) / share.sum()
        modules.append(ModalityModule(module, tuple((4,) * ranks for _ in range(segments)), upstream))
    units: list[Unit] = []
    sizes: list[float] = []
    for m in range(microbatches):
        low, high = model.images
        instances = int(np.clip(round(low + (high - low) * rng.beta(0.9, 1.6)), low, high))
        pieces = -(-instances // model.unit_images)
        split = [instances // pieces + (j < instances % pieces) for j in range(pieces)] if pieces else []
        first = len(units)
        if model.modules[0][0] == "vision":
            units += [Unit(first + j, "vision", m, 0, n, (first + pieces,)) for j, n in enumerate(split)]
            units.append(Unit(first + pieces, "text", m))
            sizes += [*map(float, split), float(rng.uniform(0.93, 1.0))]
        else:
            units.append(Unit(first, "text", m, 0, 1, tuple(range(first + 1, first + 1 + pieces))))
            units += [Unit(first + 1 + j, "video", m, 0, n) for j, n in enumerate(split)]
            sizes += [0.12 * instances, *(n * float(rng.uniform(0.5, 1.5)) for n in split)]
    cost = {module: (seconds, gib) for module, _, seconds, gib in model.modules}
    base, held = [], []
    for u, size in zip(units, sizes, strict=True):
        for k in range(shares[u.module].shape[0]):
            base.append(cost[u.module][0] * size * shares[u.module][k])
            held.append(cost[u.module][1] * GIB * size * shares[u.module][k])
    forward = np.repeat(np.array(base)[None], candidates, axis=0)
    extra = np.linspace(0.0, 1.0, candidates)[:, None, None] if candidates > 1 else np.zeros((1, 1, 1))
    backward = forward * (1.08 + extra)
    weight = forward * 0.92
    activation = np.round(np.array(held)[None] * (1.0 - 0.92 * extra))
    deferred_activation = np.round(np.repeat(np.array(held)[None] * 0.5, candidates, axis=0))
    limit = np.full(ranks, 80 * GIB if limited else np.inf)
    return OperationGraph(
        ranks=ranks,
        modules=tuple(modules),
        units=tuple(units),
        forward=forward,
        backward=backward,
        weight=weight,
        fused=(backward + weight) * 0.99,
        activation=activation,
        deferred_activation=deferred_activation,
        transfer=np.full(len(base), 2e-4),
        static_bytes=np.full(ranks, (80.0 - model.budget_gib) * GIB),
        memory_limit=limit,
    )


def small_graphs(**fixed: object) -> st.SearchStrategy[OperationGraph]:
    """Hypothesis strategy over :func:`random_graph`; keyword arguments fix what would be drawn."""
    return st.integers(0, 2**32 - 1).map(lambda seed: random_graph(seed, **fixed))  # type: ignore[arg-type]
