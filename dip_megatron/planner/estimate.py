"""What a team would gain: the layout it trains with today, the best that Megatron's schedules could do, and DIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..core.graph import Floats
from ..describe.cost import Cluster, Costs
from ..describe.cost.calibration import Scale
from ..describe.model import ModelError, MultimodalModel, Partition
from ..describe.workload import GlobalBatch, Microbatch
from ..schedulers.common import BaselineError
from ..schedulers.entry import Effort
from ..schedulers.registry import find_schedule
from ..schedulers.static import given_choice, tune_static
from .balance import Work, assign, microbatch_work
from .facade import Setting, plan_batch, searched_partition
from .planning_result import PlanningResult
from .searchers import PATIENCE, THRIFTY_GAP

UNCERTAIN = 0.2  # of an encoder's modelled price, either way; `dip profile` measures it instead

Iteration = Sequence[Sequence[Microbatch]]
"""Each replica's microbatches."""


@dataclass(frozen=True)
class Outcome:
    """One way to train these batches. ``seconds``: a replica's mean iteration, ``job_seconds``: the mean iteration of
    the slowest replica, which all wait for; ``peak_bytes`` of the fullest rank; ``recompute``: share of compute time;
    ``bound``: mean lower bound of the batches. ``layout`` in words; ``jobs``: the slowest replica's seconds, iteration
    by iteration. ``planning``: seconds of an iteration in which planning has the ranks' cores, where they compute on
    cores; part of all other seconds."""

    name: str
    seconds: float
    job_seconds: float
    bubble_ratio: float
    peak_bytes: float
    fits: bool
    recompute: float
    bound: float
    layout: str
    jobs: tuple[float, ...] = ()
    planning: float = 0.0

    @property
    def straggling(self) -> float:
        """The slowest replica over the mean."""
        return self.job_seconds / self.seconds if self.seconds > 0 else 1.0


@dataclass(frozen=True)
class Estimate:
    """``outcomes`` by what they are: ``today``, ``megatron`` (its best), ``dip``, ``balanced`` (DIP with exchanged
    microbatches); those that can't run are missing and ``refused`` says why. ``gain``: today's
    job over DIP's, each with the ``rest`` of an iteration; ``gain_of_batches``: the quartiles of that of single
    iterations; ``gain_between``: the gain where the encoders' prices are ``UNCERTAIN`` off. ``replicas``: how many were
    simulated.
    """

    outcomes: dict[str, Outcome]
    refused: dict[str, str]
    gain: float | None
    gain_of_batches: tuple[float, float] | None
    gain_between: tuple[float, float] | None
    partition: Partition
    replicas: int
    iterations: int
    rest: float = 0.0


def todays_choice(
    model: MultimodalModel, microbatches: int, layers: tuple[tuple[int, ...], ...] | None = None
) -> Partition:
    """Megatron's own layout of a model: every encoder whole on the first stage, the last module's layers spread evenly
    over all, or as ``layers`` (``[virtual stage][rank]``) say. Raises ModelError where Megatron couldn't do that."""
    ranks, last = model.parallel.pp, model.modules[-1]
    if layers is None:
        if last.layers % ranks:
            raise ModelError(f"{last.layers} layers can't be spread evenly over {ranks} stages")
        layers = ((last.layers // ranks,) * ranks,)
    segments = len(layers)
    nothing = ((0,) * ranks,) * (segments - 1)
    encoders = {m.name: ((m.layers, *(0,) * (ranks - 1)), *nothing) for m in model.modules[:-1]}
    name = "megatron-1f1b" if segments == 1 else "megatron-interleaved"
    choice = given_choice(name, model, encoders | {last.name: layers})
    reason = find_schedule(name).refusal(model, microbatches)
    if reason is not None:
        raise ModelError(reason)
    return choice


def estimate(
    model: MultimodalModel, cluster: Cluster, costs: Costs | None, known: Iteration, judged: Sequence[Iteration],
    today: Partition | str, effort: Effort, *, unseen: Iteration | None = None,
    memory_limit: float | None = None, partition_seconds: float = 5.0, rest: float = 0.0,
    progress: Callable[[str], None] = lambda _: None,
) -> Estimate:  # fmt: skip
    """Choose on ``known`` batches, judge on others: ``judged[iteration][replica]``. DIP's partition is chosen on
    ``unseen`` batches (None: the known ones): a run has no batch yet when it builds its chunks, and takes a published
    mix.

    ``today`` is a layout, or why there is none. ``rest``: seconds of an iteration outside of its schedule (optimizer,
    reductions, logs), which count in gains. Raises what the partitioner and the search raise.
    """
    cores = model.parallel.pp if cluster.ranks_on_cores else 0
    if cores:
        effort = replace(effort, options=replace(effort.options, gap=THRIFTY_GAP, patience=PATIENCE))
    setting = Setting(
        model, cluster, tuple(GlobalBatch(tuple(r)) for r in judged[0]), costs, memory_limit,
        earlier=tuple(GlobalBatch(tuple(r)) for r in unseen or known),
    )  # fmt: skip
    progress("choosing a partition")
    partition = searched_partition(setting, partition_seconds)
    outcomes: dict[str, Outcome] = {}
    refused: dict[str, str] = {}

    def static(key: str, choose: Callable[[], Partition]) -> None:
        progress(key)
        try:
            choice = choose()
            outcomes[key] = _outcome(choice.schedule, _static_plans(setting, choice, judged), choice.explain())
        except (BaselineError, ModelError) as error:
            refused[key] = str(error)

    if isinstance(today, str):
        refused["today"] = today
    else:
        static("today", lambda: today)
    pricer = setting.pricer
    static("megatron", lambda: tune_static("megatron-interleaved", pricer, list(known), memory_limit))
    progress("dip")
    words = "; ".join(f"{m.module} {m.layers}" for m in partition.modules)
    outcomes["dip"] = _outcome("dip", _dip_plans(setting, partition, judged, effort), words, cores)
    if len(judged[0]) > 1:
        progress("balanced")
        even = [_exchanged(setting, partition, iteration) for iteration in judged]
        plans = _dip_plans(setting, partition, even, effort)
        outcomes["balanced"] = _outcome("dip, --dip-balance swap", plans, words, cores)
    gain = quartiles = between = None
    if "today" in outcomes and not isinstance(today, str):
        gain = (outcomes["today"].job_seconds + rest) / (outcomes["dip"].job_seconds + rest)
        ratios = (np.array(outcomes["today"].jobs) + rest) / (np.array(outcomes["dip"].jobs) + rest)
        quartiles = (float(np.quantile(ratios, 0.25)), float(np.quantile(ratios, 0.75)))
        ends = [gain]
        for factor in (1 / (1 + UNCERTAIN), 1 + UNCERTAIN):
            progress("if prices are off")
            off = _scaled(setting, factor)
            theirs = _outcome("", _static_plans(off, today, judged[:1]), "").job_seconds
            ours = _outcome("", _dip_plans(off, partition, judged[:1], effort), "", cores).job_seconds
            ends.append(gain * float((theirs + rest) / (ours + rest) / ratios[0]))
        between = (min(ends), max(ends))
    return Estimate(outcomes, refused, gain, quartiles, between, partition, len(judged[0]), len(judged), rest)


def _scaled(setting: Setting, factor: float) -> Setting:
    """The setting with the encoders' (all modules' but the last) seconds times ``factor``."""
    costs = setting.costs or Costs()
    scales = tuple(
        Scale(m.name, "*", quantity, factor)
        for m in setting.model.modules[:-1]
        for quantity in ("forward", "backward", "weight")
    )
    return replace(setting, costs=replace(costs, scales=costs.scales + scales))


def _static_plans(setting: Setting, choice: Partition, judged: Sequence[Iteration]) -> list[list[PlanningResult]]:
    entry = find_schedule(choice.schedule)
    graphs = setting.graphs(entry, choice)
    return [[plan_batch(entry, graphs, r, Effort(), choice.group) for r in iteration] for iteration in judged]


def _dip_plans(
    setting: Setting, partition: Partition, judged: Sequence[Iteration], effort: Effort
) -> list[list[PlanningResult]]:
    entry = find_schedule("dip")
    graphs = setting.graphs(entry, partition)
    return [[plan_batch(entry, graphs, r, effort, None) for r in iteration] for iteration in judged]


def _exchanged(setting: Setting, partition: Partition, iteration: Iteration) -> Iteration:
    """As replicas have them after an exchange of whole microbatches."""
    graphs = setting.graphs(find_schedule("dip"), partition)
    works = [microbatch_work(graphs.build(tuple(r), forward_only=False)) for r in iteration]
    seconds, held = (np.concatenate([w[i] for w in works]) for i in (0, 1))
    owners = np.repeat(np.arange(len(iteration)), [len(r) for r in iteration])
    new = assign(Work(seconds, held, owners, len(iteration))).replica
    everything = [m for r in iteration for m in r]
    return [[m for m, owner in zip(everything, new, strict=True) if owner == r] for r in range(len(iteration))]


def _outcome(name: str, plans: Sequence[Sequence[PlanningResult]], layout: str, cores: int = 0) -> Outcome:
    """``cores``: of a replica's ranks, which plans are made on, too; 0: on others."""
    flat = [p for line in plans for p in line]
    planning = float(np.mean([p.plan_seconds for p in flat])) / cores if cores else 0.0
    times: Floats = np.array([[p.iteration_time for p in line] for line in plans]) + planning
    return Outcome(
        name=name,
        seconds=float(times.mean()),
        job_seconds=float(times.max(axis=1).mean()),
        bubble_ratio=float(np.average([p.bubble_ratio for p in flat], weights=times.ravel())),
        peak_bytes=max(max(p.peak_bytes) for p in flat),
        fits=all(p.fits for p in flat),
        recompute=float(np.mean([p.recompute_fraction for p in flat])),
        bound=float(np.mean([p.lower_bound for p in flat])),
        layout=layout,
        jobs=tuple(times.max(axis=1).tolist()),
        planning=planning,
    )
