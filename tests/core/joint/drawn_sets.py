"""Drawn sets of joint plans: coupled replicas of one model with batches of their own, run in an order that can be run;
and the same with a fault in one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dip_megatron.core import ModalityModule, OperationGraph, Plan, Schedule, Unit
from dip_megatron.core.experts import ExpertLayers
from dip_megatron.core.lower import lower
from dip_megatron.core.operations import Kind
from dip_megatron.core.plan import Predicted
from dip_megatron.core.plan_set import PlanSet
from dip_megatron.core.simulate import DeadlockError

F, B, W, BW = (int(k) for k in Kind)


@dataclass(frozen=True, eq=False)
class Drawn:
    """``schedules[g]`` run ``graphs[g]`` together; ``strategies`` are names ``[g][s][p]``."""

    graphs: tuple[OperationGraph, ...]
    schedules: tuple[Schedule, ...]
    experts: ExpertLayers


def modules_of(rng: np.random.Generator, ranks: int) -> tuple[ModalityModule, ...]:
    """A text model, with or without encoders, in one or two segments; sometimes frozen in part."""
    names = [("text",), ("vision", "text"), ("vision", "audio", "text")][int(rng.choice([0, 1, 1, 1, 2]))]
    out = []
    for name in names:
        segments = int(rng.integers(1, 3))
        layers = tuple(tuple(int(n) for n in rng.integers(1, 3, ranks)) for _ in range(segments))
        trainable = tuple(tuple(bool(x) for x in rng.random(ranks) < 0.5) for _ in range(segments))
        upstream = names[:-1] if name == "text" else ()
        out.append(ModalityModule(name, layers, upstream, trainable if rng.random() < 0.2 else ()))
    return tuple(out)


def graph_of(
    rng: np.random.Generator, modules: tuple[ModalityModule, ...], ranks: int, microbatches: int
) -> OperationGraph:
    """One replica's batch."""
    units: list[Unit] = []
    for m in range(microbatches):
        counts = [int(rng.integers(0, 3)) if not module.upstream and len(modules) > 1 else 1 for module in modules]
        text = len(units) + sum(counts) - 1
        for module, count in zip(modules, counts, strict=True):
            for j in range(count):
                units.append(Unit(len(units), module.name, m, j, 1, () if len(units) == text else (text,)))
    rows = sum(next(x for x in modules if x.name == u.module).segments for u in units)
    shape = (1, rows, ranks)
    forward, backward, weight = (rng.uniform(1.0, 9.0, shape) for _ in range(3))
    graph = OperationGraph(
        ranks=ranks, modules=modules, units=tuple(units), forward=forward, backward=backward, weight=weight,
        fused=(backward + weight) * 0.97, activation=np.round(rng.uniform(1, 9, shape)),
        deferred_activation=np.round(rng.uniform(0, 3, shape)), transfer=rng.uniform(0, 1, rows),
        static_bytes=np.zeros(ranks), memory_limit=np.full(ranks, np.inf),
    )  # fmt: skip
    frozen = ~graph.has_weight[None]
    weight[frozen], graph.fused[frozen], graph.deferred_activation[frozen] = 0.0, backward[frozen], 0.0
    return graph


def experts_of(rng: np.random.Generator, modules: tuple[ModalityModule, ...]) -> ExpertLayers:
    """Each layer of the text model may have experts, sometimes none of a chunk, sometimes all."""
    share = float(rng.choice([0.3, 0.6, 1.0]))
    text = modules[-1]
    return ExpertLayers.of({text.name: [[list(rng.random(n) < share) for n in row] for row in text.layers]})


def drawn_set(seed: int, replicas: int | None = None, ranks: int | None = None, like: Drawn | None = None) -> Drawn:
    """A set that can run: its orders are those of a random run of all replicas at once. ``like``: of the same model,
    and as many replicas."""
    rng = np.random.default_rng(seed)
    if like is not None:
        ranks, replicas = like.graphs[0].ranks, len(like.graphs)
    ranks, replicas = ranks or int(rng.integers(1, 4)), replicas or int(rng.integers(2, 4))
    modules, microbatches = modules_of(rng, ranks), int(rng.integers(1, 4))
    modules = modules if like is None else like.graphs[0].modules
    graphs = tuple(graph_of(rng, modules, ranks, microbatches) for _ in range(replicas))
    experts = experts_of(rng, modules) if like is None else like.experts
    schedules, events = run_at_random(rng, graphs, experts)
    names = [[["none"] * ranks for _ in range(g.virtual_microbatches)] for g in graphs]
    for g, graph in enumerate(graphs):
        for s in range(graph.virtual_microbatches):
            for p in range(ranks):
                layers = graph.module(graph.units[int(graph.unit_of[s])].module).layers[graph.segment(s)][p]
                names[g][s][p] = str(rng.choice(["none", f"selective:{layers}", f"full:{layers}", "mlp:1"]))
    for event in events:  # members of an event recompute alike
        g, s, p = event[0]
        for h, t, q in event[1:]:
            names[h][t][q] = names[g][s][p]
    graphs = tuple(
        replace(g, strategies=tuple(tuple((n,) for n in row) for row in lines))
        for g, lines in zip(graphs, names, strict=True)
    )
    return Drawn(graphs, schedules, experts)


def run_at_random(
    rng: np.random.Generator, graphs: tuple[OperationGraph, ...], experts: ExpertLayers
) -> tuple[tuple[Schedule, ...], list[list[tuple[int, int, int]]]]:  # fmt: skip
    """Orders of a run that does one thing after the other, and the stages (replica, virtual microbatch, rank) that met
    in each forward."""
    ranks, count = graphs[0].ranks, len(graphs)
    meets = [experts.meets(g) for g in graphs]
    split = [rng.random((g.virtual_microbatches, ranks)) < 0.5 for g in graphs]
    done: list[set[tuple[int, int, int]]] = [set() for _ in graphs]
    left = [
        {
            (k, s, p)
            for s in range(g.virtual_microbatches)
            for p in range(ranks)
            for k in [
                F, *([B] if g.has_backward[s, p] else []),
                *([W] if g.has_weight[s, p] and split[i][s, p] else []),
            ]
        }
        for i, g in enumerate(graphs)
    ]  # fmt: skip
    orders: list[list[list[int]]] = [[[] for _ in range(ranks)] for _ in graphs]
    met: list[list[tuple[int, int, int]]] = []
    pair: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}

    def free(i: int, k: int, s: int, p: int) -> bool:
        return all((int(d.kind), d.virtual_microbatch, d.rank) in done[i] for d in graphs[i].inputs(Kind(k), s, p))

    def run(i: int, k: int, s: int, p: int) -> None:
        g = graphs[i]
        kind = BW if k == B and g.has_weight[s, p] and not split[i][s, p] else k
        orders[i][p].append(kind * g.virtual_microbatches + s)
        done[i].add((k, s, p))
        left[i].remove((k, s, p))

    while any(left):
        own = [
            (i, *o) for i in range(count) for o in sorted(left[i]) if not (meets[i][o[1], o[2]] and o[0] != W)
            if free(i, *o)
        ]  # fmt: skip
        events = []
        ready = [sorted(o for o in left[i] if meets[i][o[1], o[2]] and o[0] != W and free(i, *o)) for i in range(count)]
        for k, s, p in ready[0]:
            chunk = (graphs[0].units[int(graphs[0].unit_of[s])].module, graphs[0].segment(s))
            members = [(0, s, p)]
            for i in range(1, count):
                if k == F:
                    fitting = [
                        (i, t, q) for kind, t, q in ready[i]
                        if kind == F and q == p
                        and (graphs[i].units[int(graphs[i].unit_of[t])].module, graphs[i].segment(t)) == chunk
                    ]  # fmt: skip
                else:
                    wanted = pair[0, s, p][i]
                    fitting = [wanted] if (k, wanted[1], p) in ready[i] else []
                if fitting:
                    members.append(fitting[int(rng.integers(len(fitting)))])
            if len(members) == count:
                events.append((k, members))
        at = int(rng.integers(len(own) + len(events)))
        if at < len(own):
            run(*own[at])
            continue
        k, members = events[at - len(own)]
        for i, s, p in members:
            run(i, k, s, p)
        if k == F:
            pair[members[0]] = members
            met.append(members)
    schedules = tuple(
        Schedule(
            tuple(np.array(o, dtype=np.int32) for o in lines), np.zeros((g.virtual_microbatches, ranks), dtype=np.int8)
        )
        for g, lines in zip(graphs, orders, strict=True)
    )
    return schedules, met


def plans_of(drawn: Drawn) -> PlanSet | None:
    """The set as plans; None if one of them can't end even alone."""
    plans = []
    for graph, schedule in zip(drawn.graphs, drawn.schedules, strict=True):
        try:
            codes = lower(graph, schedule)
        except DeadlockError:
            return None
        plans.append(Plan(graph, schedule, codes, Predicted(1.0, 0.0, 0.0, (0.0,) * graph.ranks)))
    return PlanSet.of(plans, drawn.experts)


def with_order(drawn: Drawn, g: int, p: int, order: list[int]) -> Drawn:
    """The set with another order of one rank of one replica."""
    old = drawn.schedules[g]
    orders = tuple(np.array(order, dtype=np.int32) if q == p else o for q, o in enumerate(old.orders))
    schedules = tuple(Schedule(orders, old.strategy) if h == g else s for h, s in enumerate(drawn.schedules))
    return replace(drawn, schedules=schedules)


def moved(drawn: Drawn, rng: np.random.Generator) -> Drawn:
    """One operation of one rank of one replica up to three places from where it was, or anywhere."""
    g, p = int(rng.integers(len(drawn.graphs))), int(rng.integers(drawn.graphs[0].ranks))
    order = drawn.schedules[g].orders[p].tolist()
    i = int(rng.integers(len(order)))
    near = int(np.clip(i + rng.integers(-3, 4), 0, len(order) - 1))
    order.insert(near if rng.random() < 0.8 else int(rng.integers(len(order))), order.pop(i))
    return with_order(drawn, g, p, order)


def exchanged(drawn: Drawn, rng: np.random.Generator) -> Drawn:
    """On one rank of one replica two virtual microbatches of one chunk change places, forwards or backwards or both."""
    g, p = int(rng.integers(len(drawn.graphs))), int(rng.integers(drawn.graphs[0].ranks))
    graph, rows = drawn.graphs[g], drawn.graphs[g].virtual_microbatches
    kinds: list[int] = [[F], [B, BW, W], [F, B, BW, W]][int(rng.integers(3))]
    by_chunk: dict[tuple[str, int], list[int]] = {}
    for s in range(rows):
        by_chunk.setdefault((graph.units[int(graph.unit_of[s])].module, graph.segment(s)), []).append(s)
    groups = [v for v in by_chunk.values() if len(v) > 1]
    if not groups:
        return moved(drawn, rng)
    a, b = rng.choice(groups[int(rng.integers(len(groups)))], 2, replace=False).tolist()
    swap = {a: b, b: a}
    order = [
        c // rows * rows + swap.get(c % rows, c % rows) if c // rows in kinds else c
        for c in drawn.schedules[g].orders[p].tolist()
    ]
    return with_order(drawn, g, p, order)


def recomputed(drawn: Drawn, rng: np.random.Generator) -> Drawn:
    """One stage with another memory strategy."""
    g = int(rng.integers(len(drawn.graphs)))
    graph = drawn.graphs[g]
    s, p = int(rng.integers(graph.virtual_microbatches)), int(rng.integers(graph.ranks))
    layers = graph.module(graph.units[int(graph.unit_of[s])].module).layers[graph.segment(s)][p]
    names = [list(line) for line in graph.strategies]
    names[s][p] = (str(rng.choice(["none", f"full:{layers}", "activation:1", "selective:1"])),)
    changed = replace(graph, strategies=tuple(map(tuple, names)))
    return replace(drawn, graphs=tuple(changed if h == g else x for h, x in enumerate(drawn.graphs)))


def rerun(drawn: Drawn, rng: np.random.Generator) -> Drawn:
    """One replica's orders drawn anew: what meets comes as before on each rank, which microbatches those are and where
    its own operations stand does not. Each plan still ends alone; all together may not."""
    g = int(rng.integers(len(drawn.graphs)))
    graph, schedule = drawn.graphs[g], drawn.schedules[g]
    rows, ranks, meets = graph.virtual_microbatches, graph.ranks, drawn.experts.meets(graph)
    chunk = [(graph.units[int(graph.unit_of[s])].module, graph.segment(s)) for s in range(rows)]
    split = rng.random((rows, ranks)) < 0.5
    wanted: list[list[tuple[bool, tuple[str, int], int]]] = []  # (backward, chunk, how manieth forward it belongs to)
    for order in schedule.orders:
        turn: dict[int, int] = {}
        line: list[tuple[bool, tuple[str, int], int]] = []
        for kind, s in (divmod(c, rows) for c in order.tolist()):
            if kind != W and meets[s, len(wanted)]:
                if kind != F and s not in turn:
                    return drawn  # broken already
                if kind == F:
                    turn[s] = len([c for back, c, _ in line if not back and c == chunk[s]])
                line.append((kind != F, chunk[s], turn[s]))
        wanted.append(line)
    left = {(F, s, p) for s in range(rows) for p in range(ranks)}
    left |= {(B, s, p) for _, s, p in left if graph.has_backward[s, p]}
    left |= {(W, s, p) for _, s, p in left if graph.has_weight[s, p] and split[s, p]}
    done: set[tuple[int, int, int]] = set()
    orders: list[list[int]] = [[] for _ in range(ranks)]
    at = [0] * ranks
    turns: list[dict[int, int]] = [{} for _ in range(ranks)]

    def may(k: int, s: int, p: int) -> bool:
        if not all((int(d.kind), d.virtual_microbatch, d.rank) in done for d in graph.inputs(Kind(k), s, p)):
            return False
        if k == W or not meets[s, p]:
            return True
        if at[p] == len(wanted[p]):
            return False
        back, which, turn = wanted[p][at[p]]
        return back == (k == B) and which == chunk[s] and (k == F or turns[p].get(s) == turn)

    while left:
        free = sorted(o for o in left if may(*o))
        if not free:
            return drawn  # these microbatches can't meet in that order
        k, s, p = free[int(rng.integers(len(free)))]
        orders[p].append((BW if k == B and graph.has_weight[s, p] and not split[s, p] else k) * rows + s)
        if k != W and meets[s, p]:
            if k == F:
                turns[p][s] = wanted[p][at[p]][2]
            at[p] += 1
        left.remove((k, s, p))
        done.add((k, s, p))
    for p, codes in enumerate(orders):
        drawn = with_order(drawn, g, p, codes)
    return drawn


def crossed(drawn: Drawn, rng: np.random.Generator) -> Drawn:
    """On one rank of one replica, two neighbours among the operations that meet change places."""
    g, p = int(rng.integers(len(drawn.graphs))), int(rng.integers(drawn.graphs[0].ranks))
    graph, order = drawn.graphs[g], drawn.schedules[g].orders[p].tolist()
    rows, meets = graph.virtual_microbatches, drawn.experts.meets(graph)
    at = [i for i, c in enumerate(order) if c // rows != W and meets[c % rows, p]]
    if len(at) < 2:
        return moved(drawn, rng)
    k = int(rng.integers(len(at) - 1))
    order[at[k]], order[at[k + 1]] = order[at[k + 1]], order[at[k]]
    return with_order(drawn, g, p, order)


def with_fault(drawn: Drawn, seed: int) -> Drawn:
    """The set with one or two changes that may or may not break it."""
    rng = np.random.default_rng(seed)
    for _ in range(int(rng.integers(1, 3))):
        drawn = [moved, crossed, crossed, exchanged, recomputed, rerun, rerun][int(rng.integers(7))](drawn, rng)
    return drawn
