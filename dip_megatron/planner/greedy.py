"""The paper's dual-queue greedy (section 4.2) in plain Python: what is left when no planner worker answers.

It needs neither numba nor a process, takes milliseconds to tens of milliseconds, and always ends: admission of forwards
follows the banker's rule, so that the microbatch at the head of the line can always finish.
"""

from __future__ import annotations

import numpy as np

from ..schedule import Kind, Schedule, StageGraph

MISSING = -1.0


class NothingFitsError(ValueError):
    """A microbatch alone is over a rank's memory limit even with the leanest strategy; the message says how far."""


def leanest(graph: StageGraph) -> np.ndarray:
    """Per stage, the candidate that holds the fewest bytes, ``[S, P]`` int8."""
    return graph.activation.argmin(axis=0).astype(np.int8)


def greedy(graph: StageGraph) -> Schedule:
    """List-schedule forwards and (unsplit) backwards in the order of microbatches.

    Per rank the earliest ready operation runs next; where a forward and a backward are ready, the kind that did not run
    last (1F1B). Stages use the fastest strategy if everything fits at once, else the leanest. Raises NothingFitsError.
    """
    rows, ranks = graph.rows, graph.ranks
    room = graph.memory_limit - graph.static_bytes
    fast = np.zeros((rows, ranks), dtype=np.int8)
    strategy = fast if np.all(graph.activation[0].sum(axis=0) <= room) else leanest(graph)
    chosen = graph.project(strategy)
    forward, fused, weightless = chosen.forward[0], chosen.fused[0], chosen.backward[0]
    bytes_held = chosen.activation[0]
    microbatch = np.array([graph.units[int(u)].microbatch for u in graph.row_unit])
    count = int(microbatch.max()) + 1
    need = np.zeros((count, ranks))
    np.add.at(need, microbatch, bytes_held)
    _check_fits(need, room)

    held = np.zeros((count, ranks))
    orders: list[list[int]] = [[] for _ in range(ranks)]
    clock = np.zeros(ranks)
    last_was_forward = [False] * ranks
    f_end = np.full((rows, ranks), MISSING)
    b_end = np.full((rows, ranks), MISSING)
    todo_f = [list(range(rows)) for _ in range(ranks)]
    todo_b = [[s for s in range(rows) if graph.has_backward[s, p]] for p in range(ranks)]
    left_b = np.zeros((count, ranks), dtype=np.int64)
    for p in range(ranks):
        for s in todo_b[p]:
            left_b[microbatch[s], p] += 1

    def arrival(s: int, p: int, backward: bool) -> float:
        step = -1 if graph.row_reversed[s] else 1
        if not backward:
            if p != graph.entry_rank(s):
                before = f_end[s, p - step]
                return MISSING if before < 0 else float(before + graph.hop[s])
            ends = [f_end[q, graph.exit_rank(q)] + graph.hop[q] * (graph.ranks > 1) if
                    f_end[q, graph.exit_rank(q)] >= 0 else MISSING for q in graph.previous_rows[s]]  # fmt: skip
        else:
            if f_end[s, p] < 0:
                return MISSING
            if p != graph.exit_rank(s):
                after = b_end[s, p + step]
                return MISSING if after < 0 else float(max(after + graph.hop[s], f_end[s, p]))
            ends = [float(f_end[s, p])]
            ends += [b_end[n, graph.entry_rank(n)] + graph.hop[s] if b_end[n, graph.entry_rank(n)] >= 0 else MISSING
                     for n in graph.next_rows[s]]  # fmt: skip
        return MISSING if any(e < 0 for e in ends) else float(max(ends, default=0.0))

    def admitted(s: int, p: int) -> bool:
        """Banker's rule, per rank: after this forward every earlier microbatch can still finish in turn."""
        m = microbatch[s]
        free = room[p] - held[:, p].sum() - bytes_held[s, p]
        if free < 0:
            return False
        returned = 0.0
        for earlier in range(count):
            if earlier != m and left_b[earlier, p] and free + returned < need[earlier, p] - held[earlier, p]:
                return False
            returned += held[earlier, p] + (bytes_held[s, p] if earlier == m else 0.0)
            if earlier >= m:
                return True
        return True

    remaining = sum(map(len, todo_f)) + sum(map(len, todo_b))
    while remaining:
        best: tuple[float, bool, int, int, bool] | None = None
        for p in range(ranks):
            for backward, queue in ((True, todo_b[p]), (False, todo_f[p])):
                for s in queue:
                    ready = arrival(s, p, backward)
                    if ready < 0 or (not backward and graph.has_backward[s, p] and not admitted(s, p)):
                        continue
                    start = max(float(clock[p]), ready)
                    same_kind_again = last_was_forward[p] != backward
                    if best is None or (start, same_kind_again) < best[:2]:
                        best = (start, same_kind_again, s, p, backward)
                    if start <= clock[p]:
                        break
        if best is None:
            raise NothingFitsError("no operation may run: the memory limit leaves no way to finish a microbatch")
        start, _, s, p, backward = best
        m = microbatch[s]
        if backward:
            kind = Kind.BW if graph.has_weight[s, p] else Kind.B
            b_end[s, p] = clock[p] = start + (fused[s, p] if kind == Kind.BW else weightless[s, p])
            held[m, p] -= bytes_held[s, p]
            left_b[m, p] -= 1
            todo_b[p].remove(s)
        else:
            kind = Kind.F
            f_end[s, p] = clock[p] = start + forward[s, p]
            if graph.has_backward[s, p]:
                held[m, p] += bytes_held[s, p]
            todo_f[p].remove(s)
        last_was_forward[p] = not backward
        orders[p].append(int(kind) * rows + s)
        remaining -= 1
    return Schedule(tuple(np.array(o, dtype=np.int32) for o in orders), strategy)


def _check_fits(need: np.ndarray, room: np.ndarray) -> None:
    over = need - room[None, :]
    if np.any(over > 0):
        m, p = np.unravel_index(int(over.argmax()), over.shape)
        raise NothingFitsError(
            f"microbatch {m} alone needs {over[m, p]:.0f} bytes more than rank {p} has left beside its weights; "
            "raise --dip-memory-limit, use smaller microbatches, more pipeline ranks or tensor parallelism"
        )
