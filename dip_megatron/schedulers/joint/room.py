"""Leaner strategies where an order holds more than there is memory for: those that cost the least seconds a byte."""

from __future__ import annotations

from ...core.simulate.compiled import compiled
from ...core.simulate.kernels import BACKWARD, FORWARD, WEIGHT
from .sequences import JointProblem, JointSequences, first_over


@compiled
def _extra(q: JointProblem, n: int, c: int) -> float:
    """Seconds of a stage with a strategy, all its operations together."""
    seconds = q.duration[FORWARD, c, n]
    if q.has_backward[n]:
        seconds += q.duration[BACKWARD, c, n]
        if q.has_weight[n]:
            seconds += q.duration[WEIGHT, c, n]
    return float(seconds)


@compiled
def make_room(q: JointProblem, s: JointSequences) -> bool:
    """Before a walk: give stages leaner strategies until every rank of every replica stays within its memory; False if
    that can't be. Stages that meet get theirs in all replicas."""
    x = q.x
    candidates = q.duration.shape[1]
    for line in range(len(s.lengths)):
        g, p = line // x.ranks, line % x.ranks
        while True:
            over = first_over(q, s, line)
            if over < 0:
                break
            best, chosen, least = -1, 0, 0.0
            for n in range(x.base[g] + p, x.base[g + 1], x.ranks):
                # What is held there: from its forward to its backward, without one while it runs.
                until = s.place[x.nodes + n] if q.has_backward[n] else s.place[n] + 1
                if not s.place[n] <= over < until:
                    continue
                now = s.strategy[n]
                for c in range(candidates):
                    saved = q.activation[now, n] - q.activation[c, n]
                    if saved <= 0.0:
                        continue
                    price = max(0.0, _extra(q, n, c) - _extra(q, n, now)) / saved
                    if best < 0 or price < least:
                        best, chosen, least = n, c, price
            if best < 0:
                return False
            for h in range(x.replicas):
                m = q.member[h, q.place_of[best]]
                if m == best or (x.chunk[best] >= 0 and m >= 0):
                    s.strategy[m] = chosen
                    s.best_strategy[m] = chosen
    for line in range(len(s.lengths)):  # noqa: SIM110 (all() would allocate)
        if first_over(q, s, line) >= 0:  # what is leaner in one replica may not be in another
            return False
    return True
