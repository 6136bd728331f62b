"""What plans of coupled replicas must agree in, so that they don't hang together and no backward is paired with another
one's forward.

Collectives of experts run over all coupled replicas at once, one after the other in the order in which each member
comes to them. Plans run to their end, with the gradients of their own microbatches and beside any others that do, when

1. on each pipeline rank all replicas have the same sequence of (chunk, forward or backward), over the operations that
   meet (those of chunks with experts, weight gradients left out) and the starts of reductions, and paired backwards
   repeat the collectives of the same layers;
2. backwards of a chunk are paired as its forwards were: else token counts don't fit, or, where they are padded to a
   capacity, gradients are silently wrong;
3. the union of all plans has no cycle: see :mod:`.verify`.

Which microbatches meet, what is split, and where weight gradients stand is free.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .codes import Decoder, first_reduction
from .errors import CouplingError
from .experts import NO_EXPERTS, ExpertLayers, ExpertLayersError
from .graph import Ints
from .operations import Kind
from .plan import Plan
from .reductions import reduction_order, reduction_turns
from .strategies import StrategyError

Place = tuple[int, int]
"""(replica, pipeline rank)"""


def experts_of(plans: Sequence[Plan]) -> ExpertLayers:
    """The expert layers that all plans of a set name, each plan at its place. Raises CouplingError if they differ."""
    if not plans:
        raise CouplingError("size", "a set of plans has none")
    first = plans[0].coupled
    if len(plans) == 1 and first is None:
        return NO_EXPERTS
    for g, plan in enumerate(plans):
        if first is None or plan.coupled is None:
            raise CouplingError(
                "size", f"the plan of replica {g} doesn't say which replicas it is coupled with; plan again"
            )
        if (plan.coupled.replica, plan.coupled.replicas) != (g, len(plans)):
            raise CouplingError(
                "size",
                f"plan {g} of {len(plans)} says it is replica {plan.coupled.replica}'s of {plan.coupled.replicas}",
            )
        if plan.coupled.experts != first.experts:
            raise CouplingError("size", f"replica {g} has experts in other layers than replica 0")
    assert first is not None
    return first.experts


def check_shapes(plans: Sequence[Plan], experts: ExpertLayers) -> None:
    """Raise CouplingError unless all replicas have the same ranks and chunks, and these the layers with ``experts``."""
    first = plans[0].graph
    shapes = [(m.name, m.layers, m.upstream, m.reversed) for m in first.modules]
    for g, plan in enumerate(plans):
        if plan.graph.ranks != first.ranks:
            raise CouplingError(
                "size", f"replica {g} has {plan.graph.ranks} pipeline ranks, replica 0 has {first.ranks}"
            )
        if [(m.name, m.layers, m.upstream, m.reversed) for m in plan.graph.modules] != shapes:
            raise CouplingError("size", f"replica {g} is cut into other chunks than replica 0")
    try:
        experts.check(first.modules)
        for plan in plans:
            experts.repeats(plan.graph)
    except (ExpertLayersError, StrategyError) as error:
        raise CouplingError("size", str(error)) from error


class _Line:
    """What one rank of one replica does with others, in order: ``code`` of the action, ``what`` the (chunk, forward or
    backward) or, negative, the chunk whose reduction starts, ``repeats`` the layers whose collectives a backward
    repeats, ``turn`` how manieth forward of its chunk belongs to it."""

    def __init__(
        self, code: Ints, what: NDArray[np.int64], repeats: NDArray[np.int64], turn: NDArray[np.int64]
    ) -> None:
        self.code, self.what, self.repeats, self.turn = code, what, repeats, turn


def _meeting(plan: Plan, chunks: Ints, repeats: NDArray[np.int64], rank: int) -> _Line:
    rows, first = plan.graph.virtual_microbatches, first_reduction(plan.graph)
    code = plan.codes[rank][(plan.codes[rank] < 4 * rows) | (plan.codes[rank] >= first)]
    starts = code >= first
    kind, row = np.divmod(np.where(starts, 0, code), rows)
    meets = starts | ((chunks[row, rank] >= 0) & (kind != int(Kind.W)))
    code, kind, row, starts = code[meets], kind[meets], row[meets], starts[meets]
    ahead, back = ~starts & (kind == int(Kind.F)), ~starts & (kind != int(Kind.F))
    what = np.where(starts, -1 - (code - first), 2 * chunks[row, rank] + back).astype(np.int64)
    turns = np.full(rows, -1, dtype=np.int64)
    turns[row[ahead]] = _occurrence(what[ahead])
    return _Line(code, what, np.where(back, repeats[row, rank], 0), np.where(starts, 0, turns[row]))


def _occurrence(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How manieth of its value each entry is."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    first = np.concatenate([[True], ranked[1:] != ranked[:-1]]) if len(ranked) else np.zeros(0, dtype=bool)
    start = np.maximum.accumulate(np.where(first, np.arange(len(ranked)), 0))
    out = np.empty(len(values), dtype=np.int64)
    out[order] = np.arange(len(ranked)) - start
    return out


def check_agreement(plans: Sequence[Plan], experts: ExpertLayers) -> None:
    """Raise CouplingError at the first event or reduction at which replicas differ."""
    chunks = [experts.chunks(p.graph) for p in plans]
    repeats = [experts.repeats(p.graph)[0] for p in plans]
    for rank in range(plans[0].graph.ranks):
        lines = [_meeting(p, c, r, rank) for p, c, r in zip(plans, chunks, repeats, strict=True)]
        for g in range(1, len(plans)):
            _compare(plans, lines, g, rank)


def _compare(plans: Sequence[Plan], lines: Sequence[_Line], g: int, rank: int) -> None:
    """Raise at the first place where replicas 0 and ``g`` differ on a rank."""
    a, b = lines[0], lines[g]
    count = min(len(a.what), len(b.what))
    order, recompute, pairing = (
        _first(x[:count] != y[:count]) for x, y in ((a.what, b.what), (a.repeats, b.repeats), (a.turn, b.turn))
    )
    i = min(order, recompute, pairing)

    def named(replica: int, at: int) -> str:
        code = int(lines[replica].code[at])
        if lines[replica].what[at] < 0:
            return f"[{Decoder(plans[replica].graph).action(code, rank)}]"
        kind, row = divmod(code, plans[replica].graph.virtual_microbatches)
        return str(plans[replica].graph.operation(Kind(kind), row, rank))

    place = f"pipeline rank {rank}, event {i}"
    if i == count:
        if len(a.what) != len(b.what):
            longer = 0 if len(a.what) > count else g
            raise CouplingError(
                "order" if lines[longer].what[count] >= 0 else "reduction",
                f"{place}: replica {longer} runs {named(longer, count)} where replica {g - longer} has ended; its "
                "members would wait for ever",
            )
        return
    pair = f"replica 0 runs {named(0, i)} where replica {g} runs {named(g, i)}"
    if order == i and min(a.what[i], b.what[i]) < 0:
        raise CouplingError(
            "reduction", f"{place}: {pair}: ranks would come to their collectives in two orders and hang"
        )
    if order == i:
        raise CouplingError("order", f"{place}: {pair}: another chunk or direction; the group would hang")
    if recompute == i:
        raise CouplingError(
            "recompute",
            f"{place}: {pair}, but they recompute other layers with experts (strategies "
            f"{_strategy(plans[0], a.code[i], rank)!r} and {_strategy(plans[g], b.code[i], rank)!r}); the group would "
            "hang",
        )
    raise CouplingError(
        "pairing",
        f"{place}: {pair}: these backwards are paired although their forwards were not; gradients would be wrong",
    )


def _first(different: NDArray[np.bool_]) -> int:
    where = np.flatnonzero(different)
    return int(where[0]) if len(where) else len(different)


def _strategy(plan: Plan, code: np.int32, rank: int) -> str:
    return plan.graph.strategy_name(0, int(code) % plan.graph.virtual_microbatches, rank)


def cycle(plans: Sequence[Plan], experts: ExpertLayers, place: Ints) -> str:
    """Who waits for whom, in words; ``place[replica * ranks + rank]``: at which action each stands."""
    ranks, count = plans[0].graph.ranks, len(plans)
    chunks = [experts.chunks(p.graph) for p in plans]
    decoders = [Decoder(p.graph) for p in plans]
    turns = reduction_turns(plans[0].graph.modules)

    def code(where: Place) -> int:
        """Of the action at which it stands; -1 behind the last."""
        g, p = where
        i = int(place[g * ranks + p])
        return int(plans[g].codes[p][i]) if i < len(plans[g].codes[p]) else -1

    def at(where: Place) -> str:
        return str(decoders[where[0]].action(code(where), where[1]))

    def turn(where: Place) -> int:
        """Of the reduction at which it stands; -1 if it doesn't."""
        g, p = where
        first = first_reduction(plans[g].graph)
        return int(turns[code(where) - first, p]) if code(where) >= first else -1

    def meets(where: Place) -> bool:
        g, p = where
        if turn(where) >= 0:
            return True
        kind, row = divmod(code(where), plans[g].graph.virtual_microbatches)
        return 0 <= kind < 4 and kind != int(Kind.W) and bool(chunks[g][row, p] >= 0)

    def waits_for(where: Place) -> Place:
        g, p = where
        if meets(where):
            absent = next(((h, p) for h in range(count) if not meets((h, p))), None)
            return absent or before(turn(where))
        message = decoders[g].action(code(where), p).message  # type: ignore[union-attr]
        other = message.channel.source if message.channel.target == p else message.channel.target
        return g, other

    def before(turn_: int) -> Place:
        """Who has not come to the reduction before, of another rank."""
        for number, q in reversed(reduction_order(plans[0].graph.modules)[:turn_]):
            for h in range(count):
                ahead = plans[h].codes[q][: place[h * ranks + q]]
                if not (ahead == number + first_reduction(plans[h].graph)).any() and turn((h, q)) != turns[number, q]:
                    return h, q
        raise AssertionError("a reduction waits for none")

    stuck = next((g, p) for g in range(count) for p in range(ranks) if meets((g, p)))
    path = [stuck]
    while (following := waits_for(path[-1])) not in path:
        path.append(following)
    path = path[path.index(following) :]
    start = next((i for i, w in enumerate(path) if meets(w)), 0)  # begin where the replicas meet
    path = path[start:] + path[:start]
    steps = [f"replica {g}, rank {p} at {at((g, p))}" for g, p in path]
    shown = steps if len(steps) <= 8 else [*steps[:7], f"{len(steps) - 7} more"]
    return "each plan ends alone, all together don't: " + " waits for ".join(shown) + f", which waits for {steps[0]}"
