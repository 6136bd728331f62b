"""Monte Carlo tree search over priority orders: the paper's segment reordering (its search, phase a).

A path from the root is the beginning of a priority order of *items*; all segments of one modality in one microbatch
are one item, which is the paper's pruning. A node's score is the best one seen below it, as lower bound over time; the
child with the largest ``score ** alpha + beta * sqrt(ln(visits of parent) / visits)`` is followed until a node has
untried children, one of which is added. The paper does not give alpha and beta.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.graph import Floats, Ints
from ...core.simulate.compiled import compiled
from .keys import Keys
from .memory import Refill, evaluate
from .problem import Problem
from .random import below
from .work import Work

ALPHA, BETA = 20.0, 0.05


class Tree(NamedTuple):
    """Nodes by number, the root 0: ``item`` that the node appends, ``children`` added so far (the last of them,
    and each one's elder sibling), visits and best score. ``size`` ``[1]``: nodes in use."""

    item: Ints
    parent: Ints
    children: Ints
    youngest: Ints
    elder: Ints
    visits: Ints
    score: Floats
    size: Ints


class Rollouts(NamedTuple):
    """Buffers of :func:`roll_out`: the priority order being tried, the best one, and each item's place."""

    order: Ints
    best: Ints
    place: Floats


def make_tree(nodes: int) -> Tree:
    """A tree of the root alone, with room for ``nodes``."""

    def ints(value: int) -> Ints:
        return np.full(nodes, value, dtype=np.int32)

    size = np.zeros(1, dtype=np.int32)
    tree = Tree(
        item=ints(-1),
        parent=ints(-1),
        children=ints(0),
        youngest=ints(-1),
        elder=ints(-1),
        visits=ints(0),
        score=np.zeros(nodes),
        size=size,
    )
    tree.size[0] = 1
    return tree


def make_rollouts(items: int) -> Rollouts:
    """Buffers for orders of ``items``."""
    return Rollouts(np.zeros(items, dtype=np.int32), np.zeros(items, dtype=np.int32), np.zeros(items))


@compiled
def grow(tree: Tree, items: int, path: Ints, random: NDArray[np.uint64]) -> int:
    """Follow the best children and add one node; its items from the root go to the front of ``path`` (a permutation of
    all items). Returns the node, or the leaf reached if the order is complete or there is no room."""
    for i in range(items):
        path[i] = i
    node, depth = 0, 0
    while depth < items:
        if tree.children[node] < items - depth:
            if tree.size[0] >= len(tree.item):
                return node
            # Any item that is neither on the path nor a child already.
            skip = below(random, items - depth - tree.children[node])
            for i in range(depth, items):
                child = tree.youngest[node]
                while child >= 0 and tree.item[child] != path[i]:
                    child = tree.elder[child]
                if child < 0:
                    if skip == 0:
                        new = tree.size[0]
                        tree.size[0] += 1
                        tree.item[new], tree.parent[new] = path[i], node
                        tree.children[new] = 0
                        tree.elder[new] = tree.youngest[node]
                        tree.youngest[node] = new
                        tree.children[node] += 1
                        path[i] = path[depth]
                        path[depth] = tree.item[new]
                        return int(new)
                    skip -= 1
        best, best_value = -1, -1.0
        child = tree.youngest[node]
        while child >= 0:
            value = tree.score[child] ** ALPHA
            value += BETA * np.sqrt(np.log(max(1, tree.visits[node])) / max(1, tree.visits[child]))
            if value > best_value:
                best, best_value = child, value
            child = tree.elder[child]
        node = best
        for i in range(depth, items):
            if path[i] == tree.item[node]:
                path[i] = path[depth]
                path[depth] = tree.item[node]
                break
        depth += 1
    return int(node)


@compiled
def depth_of(tree: Tree, node: int) -> int:
    """Number of items on the path from the root."""
    depth = 0
    while node > 0:
        depth += 1
        node = tree.parent[node]
    return depth


@compiled
def back_up(tree: Tree, node: int, score: float) -> None:
    """One visit more from ``node`` to the root, and the best score of each."""
    while node >= 0:
        tree.visits[node] += 1
        tree.score[node] = max(tree.score[node], score)
        node = tree.parent[node]


@compiled
def evaluate_order(q: Problem, item: Ints, order: Ints, x: Keys, w: Work, f: Refill, r: Rollouts) -> float:
    """Time of one priority order after phases b and c: interleaving with the leanest strategies, then memory filled
    greedily rank by rank, then the simulator. Orders and strategies are left in ``w``."""
    virtual_microbatches = q.graph.virtual_microbatches
    for i in range(len(order)):
        r.place[order[i]] = i
    for i in range(q.groups):
        x.order_forward[i] = np.inf
    for s in range(virtual_microbatches):
        g = q.group[s]
        x.order_forward[g] = min(x.order_forward[g], r.place[item[s]])
    for g in range(q.groups):
        x.order_backward[g] = x.order_forward[g]
    for s in range(virtual_microbatches):
        x.shift_forward[s] = r.place[item[s]] - x.order_forward[q.group[s]]
        x.shift_backward[s] = x.shift_forward[s]
    return evaluate(q, x, w, f, np.inf)


@compiled
def roll_out(
    q: Problem, item: Ints, path: Ints, depth: int, count: int, x: Keys, w: Work, f: Refill, r: Rollouts,
    random: NDArray[np.uint64],
) -> float:  # fmt: skip
    """Best time of ``count`` random completions of the first ``depth`` items of ``path``; the order is ``r.best``."""
    best = np.inf
    for _ in range(count):
        for i in range(len(path)):
            r.order[i] = path[i]
        for i in range(len(path) - 1, depth, -1):
            j = depth + below(random, i - depth + 1)
            r.order[i], r.order[j] = r.order[j], r.order[i]
        time = evaluate_order(q, item, r.order, x, w, f, r)
        if time < best:
            best = time
            for i in range(len(path)):
                r.best[i] = r.order[i]
    return best
