"""Measured seconds, back into the cost model: straight lines fitted to what stages took, iteration after iteration."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core import Kind, Plan
from ..core.experts import ExpertLayers
from ..core.graph import Floats, OperationGraph
from ..core.idle_causes import IdleCauses, idle_before
from ..core.plan_set import PlanSet
from ..core.protocols import Timed
from ..describe.cost.corrections import KINDS, Corrections, Line, seconds_of

MEMORY = 0.8  # what an iteration's weight shrinks to with each that follows
OUTLIER = 3.0  # times the usual ratio; what is further off is a hiccup of the machine
SCATTER = 0.005  # of measured seconds around a line, that is always reckoned with
HICCUP = 20.0  # times the usual time between two operations; what others take of the cores now and then is less
LEAST, MOST = 1e-3, 1e3  # bounds on measured over predicted
STEEPEST = 50.0  # times measured over predicted; of a line whose model is mostly what doesn't grow
FLATTEST = 1e-3  # the same; of a flat line's seconds nobody could tell the model's, and it would stay for good
_HEAD = struct.Struct("<ii")
_BACKWARD = (KINDS.index(Kind.B), KINDS.index(Kind.W), KINDS.index(Kind.BW))


@dataclass(frozen=True, eq=False)
class Measurement:
    """One rank's iteration: ``seconds`` ``[operations, 2]``, start and end of each in the order of its plan."""

    request: int
    rank: int
    seconds: Floats

    @staticmethod
    def of(request: int, rank: int, spans: Sequence[Timed]) -> Measurement:
        """``request`` is the number of the plan's request, ``rank`` the pipeline rank."""
        return Measurement(request, rank, np.array([(s.start, s.end) for s in spans]).reshape(-1, 2))

    def pack(self) -> bytes:
        """Some bytes an operation."""
        return _HEAD.pack(self.request, self.rank) + self.seconds.astype("<f4").tobytes()

    @staticmethod
    def unpack(data: bytes) -> Measurement:
        """Inverse of :meth:`pack`."""
        seconds = np.frombuffer(data, dtype="<f4", offset=_HEAD.size).astype(np.float64)
        request, rank = _HEAD.unpack_from(data)
        return Measurement(request, rank, seconds.reshape(-1, 2))


@dataclass(frozen=True, eq=False)
class _Operations:
    """What one rank ran: kind and place of each operation, the cost model's seconds, the measured ones, and what passed
    between two of them."""

    kind: np.ndarray
    place: np.ndarray
    model: Floats
    seconds: Floats
    between: float


class Recalibration:
    """Fits, for every kind of operation of every chunk, measured seconds as a line over the cost model's; the first
    iteration is left out.

    Weighted least squares with older iterations forgotten exponentially. The slope is drawn towards the plain ratio by
    as much as measured seconds scatter around the line (ridge regression, of which an iteration is one observation and
    a slope twice the ratio is one standard deviation off): a chunk whose units are all of one size has no slope of its
    own, one whose seconds follow another line than the model's has it soon, however little sizes differ. A rank's
    overhead between operations counts as part of them, and is told beside. What was never run (a B where all backwards
    were whole) borrows the ratio of its kin.

    Replicas that share experts are measured together. What meets others, waits inside for the last of them to come and
    for the longest: the member that waits least is the last one, and its seconds are those of the longest (of
    :func:`..core.simulate.simulate_set`'s event). So of operations that meet the least measured seconds of all replicas
    are held against the most that the model has for any; no clocks of two hosts are compared.
    """

    def __init__(self) -> None:
        self._places: list[tuple[str, int]] = []
        self._warm = False
        self._sums = np.zeros((6, 0, 0, 0))  # weight, x, y, xx, xy, yy; [sum, kind, place, rank]
        self._between = np.zeros((2, 0))  # weight, seconds; [sum, rank]

    def observe(self, plans: PlanSet, used: Corrections, measurements: Sequence[Sequence[Measurement]]) -> None:
        """Take in an iteration.

        Args:
            plans: The plans that ran.
            used: The corrections that they were made with.
            measurements: ``[replica]``, what its ranks measured; ranks of one pipeline rank (tensor-parallel ones)
                count as one. Nothing is learnt where a pipeline rank has measured nothing, or something else.
        """
        self._begin(plans.plans[0].graph)
        ran = [self._ran(plan, used, theirs) for plan, theirs in zip(plans.plans, measurements, strict=True)]
        complete = [operations for operations in ran if operations is not None]
        if len(complete) == len(ran):
            meets = [_meeting(plan, plans.experts) for plan in plans.plans]
            by_rank = zip(zip(*complete, strict=True), zip(*meets, strict=True), strict=True)
            self._take_in([_merged(operations, met) for operations, met in by_rank])

    def _begin(self, graph: OperationGraph) -> None:
        places = [(m.name, k) for m in graph.modules for k in range(m.segments)]
        if places != self._places or self._sums.shape[3] != graph.ranks:
            self._places, self._sums = places, np.zeros((6, len(KINDS), len(places), graph.ranks))
            self._between = np.zeros((2, graph.ranks))

    def _ran(self, plan: Plan, used: Corrections, measurements: Sequence[Measurement]) -> list[_Operations] | None:
        """By pipeline rank; None if a rank's measurements are missing."""
        graph, orders = plan.graph, plan.schedule.orders
        number = {place: i for i, place in enumerate(self._places)}
        place_of = np.array([number[u.module, k] for u in graph.units for k in range(graph.module(u.module).segments)])
        planned = np.stack([_model_seconds(plan, used, i, place_of, self._places) for i in range(len(KINDS))])
        code_kind = np.array([KINDS.index(Kind(k)) for k in range(len(KINDS))])
        ran = [[m.seconds for m in measurements if m.rank == rank] for rank in range(graph.ranks)]
        if not all(here and all(len(s) == len(o) for s in here) for here, o in zip(ran, orders, strict=True)):
            return None
        mean = [np.mean(here, axis=0) for here in ran]
        idle = idle_before(graph, orders, [m[:, 0] for m in mean], [m[:, 1] for m in mean])
        found = []
        for rank, order in enumerate(orders):
            kind = code_kind[order // graph.virtual_microbatches]
            virtual_microbatch = order % graph.virtual_microbatches
            seconds = mean[rank][:, 1] - mean[rank][:, 0]
            model = planned[kind, virtual_microbatch, rank]
            between = _overhead(idle[rank], seconds)
            found.append(_Operations(kind, place_of[virtual_microbatch], model, seconds, between))
        return found

    def _take_in(self, ran: Sequence[_Operations]) -> None:
        """An iteration's operations, by pipeline rank."""
        if not self._warm:
            self._warm = True  # the first iteration also allocates, compiles and fills caches
            return
        fresh, between = np.zeros_like(self._sums), np.ones_like(self._between)
        for rank, x in enumerate(ran):
            between[1, rank] = x.between
            seconds = x.seconds + x.between
            known = (x.model > 0) & (seconds > 0)
            so_far = self._sums[:3, :, :, rank].reshape(3, -1)
            _add(fresh[:, :, :, rank], x.kind[known], x.place[known], x.model[known], seconds[known], so_far)
        self._sums *= np.where(fresh[0] > 0, MEMORY, 1.0)
        self._sums += fresh
        self._between = MEMORY * self._between + between

    def corrections(self) -> Corrections:
        """What is known by now; empty before the first observation."""
        weight, x, y, xx, xy, yy = self._sums
        if not np.any(weight):
            return Corrections()
        ratio = np.clip(self._ratios(), LEAST, MOST)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean_x, mean_y = x / weight, y / weight
            spread, common = np.maximum(xx / weight - mean_x**2, 0.0), xy / weight - mean_x * mean_y
            explained = np.where(spread > 0, common**2 / np.where(spread > 0, spread, 1.0), 0.0)
            scatter = np.maximum(yy / weight - mean_y**2 - explained, 0.0) + (SCATTER * mean_y) ** 2
            prior = scatter / (weight * ratio**2)
            slope = (common + prior * ratio) / (spread + prior)
            slope = np.clip(slope, FLATTEST * ratio, STEEPEST * ratio)
            fixed = mean_y - slope * mean_x
        seen = weight > 0
        slope, fixed = np.where(seen, slope, ratio), np.where(seen, fixed, 0.0)
        return Corrections(
            tuple(
                Line(module, segment, kind, tuple(fixed[i, j].tolist()), tuple(slope[i, j].tolist()))
                for j, (module, segment) in enumerate(self._places)
                for i, kind in enumerate(KINDS)
            ),
            tuple((self._between[1] / self._between[0]).tolist()),
        )

    def _ratios(self) -> Floats:
        """Measured over predicted, ``[kind, place, rank]``: of the operation's own kind and chunk, else of the chunk's
        other backwards, of the module's other chunks, of the rank, of all."""
        x, y = self._sums[1], self._sums[2]
        modules = np.array([module for module, _ in self._places])
        candidates = [(x, y)]
        back = [np.zeros_like(x), np.zeros_like(x)]
        for values, total in zip((x, y), back, strict=True):
            total[list(_BACKWARD)] = values[list(_BACKWARD)].sum(axis=0)
        candidates.append((back[0], back[1]))
        for axes in ((2,), (0, 2)):
            pooled = [np.zeros_like(x), np.zeros_like(x)]
            for values, total in zip((x, y), pooled, strict=True):
                for module in dict.fromkeys(modules.tolist()):
                    mine = modules == module
                    total[:, mine] = values[:, mine].sum(axis=(1, *axes), keepdims=True)
            candidates.append((pooled[0], pooled[1]))
        candidates.append((np.full_like(x, x.sum()), np.full_like(y, y.sum())))
        ratio: Floats = np.zeros_like(x)
        for sum_x, sum_y in reversed(candidates):
            ratio = np.where(sum_x > 0, sum_y / np.where(sum_x > 0, sum_x, 1.0), ratio)
        return ratio


def _meeting(plan: Plan, experts: ExpertLayers) -> list[np.ndarray]:
    """By rank: which of its operations meet those of other replicas, ``[operations]``."""
    graph, found = plan.graph, []
    meets = experts.meets(graph)
    for rank, order in enumerate(plan.schedule.orders):
        kind, virtual_microbatch = order // graph.virtual_microbatches, order % graph.virtual_microbatches
        found.append((kind != int(Kind.W)) & meets[virtual_microbatch, rank])
    return found


def _merged(replicas: Sequence[_Operations], meets: Sequence[np.ndarray]) -> _Operations:
    """Of one pipeline rank of all replicas: what meets once, of the kind of the longest member; the rest as it is."""
    model = np.stack([x.model[met] for x, met in zip(replicas, meets, strict=True)])
    seconds = np.stack([x.seconds[met] for x, met in zip(replicas, meets, strict=True)]).min(axis=0)
    longest, events = model.argmax(axis=0), np.arange(model.shape[1])
    kind, place = (
        np.stack([getattr(x, name)[met] for x, met in zip(replicas, meets, strict=True)])[longest, events]
        for name in ("kind", "place")
    )
    together = _Operations(kind, place, model[longest, events], seconds, 0.0)
    alone = [
        _Operations(x.kind[~met], x.place[~met], x.model[~met], x.seconds[~met], 0.0)
        for x, met in zip(replicas, meets, strict=True)
    ]
    names = ("kind", "place", "model", "seconds")
    joined = {name: np.concatenate([getattr(x, name) for x in (together, *alone)]) for name in names}
    return _Operations(**joined, between=float(np.mean([x.between for x in replicas])))


def _overhead(idle: IdleCauses, durations: Floats) -> float:
    """Seconds a rank needs between two operations where nothing has to be waited for: the mean, without hiccups, and an
    operation's share of what passes before the first one."""
    between = idle.between[1:][idle.waiting[1:] <= 0]
    if not len(between):
        return 0.0
    most = HICCUP * float(np.median(between))
    seconds = float(np.minimum(between, most).mean()) + min(float(idle.between[0]), most) / len(durations)
    return min(seconds, float(np.median(durations)))


def _model_seconds(
    plan: Plan, used: Corrections, kind: int, place_of: np.ndarray, places: list[tuple[str, int]]
) -> Floats:
    """The cost model's own seconds ``[S, P]`` of the plan's stages."""
    seconds: Floats = seconds_of(plan.graph, KINDS[kind])[0].copy()
    for line in used.lines:
        if line.kind == KINDS[kind] and (line.module, line.segment) in places:
            here = place_of == places.index((line.module, line.segment))
            seconds[here] = line.model(seconds[here])
    return seconds


def _add(sums: Floats, kind: np.ndarray, place: np.ndarray, x: Floats, y: Floats, so_far: Floats) -> None:
    """Add operations to ``sums`` ``[sum, kind, place]``, each group with weight 1 and hiccups cut off: what is far from
    the group's median, and medians far from what was known ``so_far`` (sums of weight, x and y ``[3, group]``)."""
    group = kind * sums.shape[2] + place
    count = np.bincount(group, minlength=sums.shape[1] * sums.shape[2])
    order = np.lexsort((y / x, group))
    first = np.cumsum(count) - count
    some = count > 0
    median = np.zeros(len(count))
    sorted_ratio = (y / x)[order]
    middle = (sorted_ratio[(first + (count - 1) // 2)[some]] + sorted_ratio[(first + count // 2)[some]]) / 2
    median[some] = middle
    known = so_far[0] > 0
    ratio = so_far[2][known] / so_far[1][known]
    median[known] = np.clip(median[known], ratio / OUTLIER, ratio * OUTLIER)
    usual = median[group] * x
    y = np.clip(y, usual / OUTLIER, usual * OUTLIER)
    share = 1.0 / count[group]
    for i, values in enumerate((np.ones_like(x), x, y, x * x, x * y, y * y)):
        sums[i] += np.bincount(group, share * values, minlength=len(count)).reshape(sums.shape[1:])
