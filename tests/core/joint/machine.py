"""A small machine that runs plans of coupled replicas collective by collective: what the joint verifier is judged by.

It knows nothing of events: a stage with experts is a list of collectives, each of which ends when every member of the
group has come to one. What a member brings to a collective tells what it believes to be part of. A reduction is one of
all replicas, and keeps a rank from whatever follows, as the strictest of devices would.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dip_megatron.core import CommunicationKind, Compute, Plan, Reduce
from dip_megatron.core.experts import ExpertLayers
from dip_megatron.core.modules import chunks_of
from dip_megatron.core.operations import Kind
from dip_megatron.core.reductions import reduction_order
from dip_megatron.core.strategies import parse_strategy

COLLECTIVES = ("dispatch", "combine")


class Machine:
    """Runs a set of plans, or several sets one after the other, ``size`` plans each; :meth:`run` gives ``"ends"``,
    ``"hangs"``, or ``"wrong"`` where members of one collective disagree on what it is, or on whose forward a backward
    belongs to, or where a gradient comes after its reduction. ``in_order``: no reduction begins before those that come
    before it in the order of all."""

    def __init__(
        self, plans: tuple[Plan, ...], experts: ExpertLayers, size: int | None = None, in_order: bool = False
    ) -> None:
        self.plans, self.flags, self.repeating = plans, dict(experts.modules), experts.repeating
        self.size = size or len(plans)
        chunks = chunks_of(plans[0].graph.modules)
        self.order = [(*chunks[n], rank) for n, rank in reduction_order(plans[0].graph.modules)] if in_order else []
        self.reduced: set[tuple[int, str, int, int]] = set()  # (replica, module, segment, rank)
        self.late = False
        self.ranks = plans[0].graph.ranks
        self.sent: set[Any] = set()
        self.posted: set[Any] = set()
        self.last: dict[tuple[int, int], int] = {}  # number of the last collective of a rank
        self.forwards: dict[
            tuple[int, int, Any, int], int
        ] = {}  # (replica, rank, stage, layer): number of its last collective
        self.events = 0

    def steps(self, g: int, p: int) -> Iterator[tuple[str, Any]]:
        """What rank ``p`` of replica ``g`` does: things that it waits for, and collectives."""
        plan = self.plans[g]
        for action in plan.actions[p]:
            if isinstance(action, Reduce):
                yield "reduction", (action.module, action.segment, p)
                self.reduced.add((g, action.module, action.segment, p))
                continue
            if isinstance(action, Compute):
                yield from self.stage(g, p, action)
                o = action.operation
                self.late |= o.kind in (Kind.W, Kind.BW) and (g, o.module, o.segment, p) in self.reduced
                continue
            key = (g, str(action.message))
            if action.kind == CommunicationKind.ISEND:
                self.sent.add(key)
            elif action.kind == CommunicationKind.IRECV:
                self.posted.add(key)
            elif action.kind == CommunicationKind.WAIT_IRECV:
                yield "until sent", key
            else:
                yield "until posted", key

    def stage(self, g: int, p: int, action: Compute) -> Iterator[tuple[str, Any]]:
        o = action.operation
        if o.module not in self.flags or o.kind == Kind.W:
            return
        layers = self.flags[o.module][o.segment][p]
        strategies = parse_strategy(action.strategy, len(layers))
        stage = (o.module, o.segment, o.unit)
        with_experts = [i for i, has in enumerate(layers) if has]
        if o.kind == Kind.F:
            for i in with_experts:
                for name in COLLECTIVES:
                    yield "collective", ((o.module, o.segment, i, name, "forward"), None)
                self.forwards[g, p, stage, i] = self.last[g, p]
            return
        for i in reversed(with_experts):
            mine = self.forwards[g, p, stage, i]
            if strategies[i] in self.repeating:
                for name in COLLECTIVES:
                    yield "collective", ((o.module, o.segment, i, name, "again"), mine)
            for name in reversed(COLLECTIVES):
                yield "collective", ((o.module, o.segment, i, name, "backward"), mine)

    def run(self) -> str:
        lines = {(g, p): self.steps(g, p) for g in range(len(self.plans)) for p in range(self.ranks)}
        waiting: dict[tuple[int, int], tuple[str, Any]] = {}
        ended: set[tuple[int, int]] = set()
        moving = True
        while moving:
            moving = False
            for where, line in lines.items():
                while where not in ended:
                    what, key = waiting.get(where, ("", None))
                    stands = (
                        what in ("collective", "reduction")
                        or (what == "until sent" and key not in self.sent)
                        or (what == "until posted" and key not in self.posted)
                    )
                    if stands:
                        break
                    moving = True
                    try:
                        waiting[where] = next(line)
                    except StopIteration:
                        ended.add(where)
            replicas = range(len(self.plans))
            groups = [("collective", replicas[i : i + self.size]) for i in replicas[:: self.size]]
            for p in range(self.ranks):
                for kind, members in [*groups, ("reduction", replicas)]:
                    group = [(g, p) for g in members]
                    if any(w in ended or waiting.get(w, ("",))[0] != kind for w in group):
                        continue
                    brought = [waiting[w][1] for w in group]
                    if any(b != brought[0] for b in brought):
                        return "wrong"
                    if kind == "reduction" and self.order:
                        if brought[0] != self.order[0]:
                            continue
                        self.order.pop(0)
                    self.events += 1
                    for w in group:
                        self.last[w] = self.events
                        del waiting[w]
                    moving = True
        return "wrong" if self.late else "ends" if len(ended) == len(lines) else "hangs"
