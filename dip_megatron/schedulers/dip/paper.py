"""The search as the paper describes it, behind ``--schedule dip-paper``.

Three phases: Monte Carlo tree search over the priority order of (microbatch, modality) pairs; dual-queue interleaving
with alternating forwards and fused backwards, under the leanest strategies; and per rank an integer program that spends
the memory left over on faster strategies. Ours where the paper is silent or would stop: memory is admitted by the
banker's rule instead of switching the forward queue off, which locks up; within the tree memory is filled greedily, and
the integer program runs on each new best plan, so that the tree gets far more rollouts per second.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ...core.graph import Ints, OperationGraph
from ...core.order import Schedule
from ...core.simulate.kernels import peak_memory
from .incumbent import Incumbent, in_threads, listed
from .keys import ALTERNATE, make_keys
from .memory import make_refill, solve_memory
from .problem import Problem
from .random import seeded
from .tree import back_up, depth_of, evaluate_order, grow, make_rollouts, make_tree, roll_out
from .work import make_work

ROLLOUTS = 10
TREE_NODES = 1 << 18
PROGRAM_SHARE = 0.1  # of the budget between two rounds of integer programs


def search_paper(
    graph: OperationGraph, q: Problem, incumbent: Incumbent, bound: float, until: float, most: int | None, workers: int,
    seed: int,
) -> None:  # fmt: skip
    """Search until ``until`` (seconds since the start) or ``most`` evaluations; the best goes to ``incumbent``. Workers
    share one tree."""
    item = _items(graph)
    items = int(item.max()) + 1
    tree = make_tree(TREE_NODES if most is None else min(TREE_NODES, most + 2))
    programmed = [0.0]

    reserve = 0.1 * until if most is None and q.graph.candidates > 1 and q.bounded.any() else 0.0

    def work(stream: int) -> None:
        x = make_keys(q, split=False)
        x.base[:] = q.activation.argmin(axis=0).astype(np.int8)
        x.flags[ALTERNATE] = True
        w, f, r, random = make_work(q), make_refill(q), make_rollouts(items), seeded(seed, stream)
        path = np.arange(items, dtype=np.int32)
        if stream == 0:  # the natural order: a valid plan at once
            evaluate_order(q, item, path, x, w, f, r)
            incumbent.offer(listed(q, w))
            incumbent.count(1)
        while incumbent.elapsed() < until - reserve and (most is None or incumbent.evaluations < most):
            with incumbent.lock:
                node = grow(tree, items, path, random)
                depth = depth_of(tree, node)
            count = ROLLOUTS if most is None else min(ROLLOUTS, most - incumbent.evaluations)
            time = roll_out(q, item, path, depth, count, x, w, f, r, random)
            incumbent.count(count)
            if time < incumbent.time:
                r.order[:] = r.best
                evaluate_order(q, item, r.order, x, w, f, r)
                found = listed(q, w)
                incumbent.offer(found)
                if most is not None or incumbent.elapsed() - programmed[0] > PROGRAM_SHARE * until:
                    programmed[0] = incumbent.elapsed()
                    better = program_memory(q, found, until - incumbent.elapsed() if most is None else None)
                    if better is not None:
                        time = min(time, incumbent.offer(better))
            with incumbent.lock:
                back_up(tree, node, bound / time if time > 0 else 1.0)

    in_threads([partial(work, i) for i in range(workers)], workers)
    if incumbent.schedule is not None and (most is not None or incumbent.elapsed() - programmed[0] > 0.0):
        better = program_memory(q, incumbent.schedule, max(0.01, reserve) if most is None else None)
        if better is not None:
            incumbent.offer(better)


def program_memory(q: Problem, schedule: Schedule, seconds: float | None) -> Schedule | None:
    """``schedule`` with the strategies of the integer programs, rank by rank; None if they change nothing.

    ``seconds``: stop when so much time is spent; None: after a number of nodes (see :func:`.memory.solve_memory`).
    """
    if q.graph.candidates == 1 or not q.bounded.any() or (seconds is not None and seconds <= 0):
        return None
    strategy = schedule.strategy.copy()
    changed = False
    each = None if seconds is None else max(0.01, min(1.0, seconds / q.graph.ranks))
    for p in range(q.graph.ranks):
        if not q.bounded[p]:
            continue
        chosen = solve_memory(q, p, schedule.orders[p], strategy[:, p], seconds=each)
        if chosen is None:
            continue
        tried = strategy.copy()
        tried[:, p] = chosen
        order = schedule.orders[p]
        peak = peak_memory(q.graph, p, order, len(order), np.ascontiguousarray(tried.reshape(-1)))
        if peak - q.graph.static_bytes[p] <= q.capacity[p] * q.bytes_per_count:
            strategy, changed = tried, True
    return Schedule(schedule.orders, strategy) if changed else None


def _items(graph: OperationGraph) -> Ints:
    """Number of the (microbatch, module) pair of each virtual microbatch, in natural order."""
    module = {m.name: i for i, m in enumerate(graph.modules)}
    pairs = [(graph.units[int(u)].microbatch, module[graph.units[int(u)].module]) for u in graph.unit_of]
    number = {pair: i for i, pair in enumerate(sorted(set(pairs)))}
    return np.array([number[pair] for pair in pairs], dtype=np.int32)
