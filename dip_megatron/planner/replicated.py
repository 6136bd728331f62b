"""Replicas of one job, simulated: each has batches of its own, and a step lasts as long as the slowest one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..core.graph import Floats
from ..describe.model import Partition
from ..describe.workload import Microbatch
from ..schedulers.entry import Effort
from ..schedulers.registry import find_schedule
from .balance import Places, Work, assign, lines, microbatch_work
from .facade import Setting, choose_chunks, plan_batch

Batch = Sequence[Microbatch]
Balance = Literal["off", "swap", "free"]

PLANNED = 32
"""Of more replicas not all are planned: a third of as many, those that are worth most, and some others."""


@dataclass(frozen=True)
class Outcome:
    """Seconds of the slowest replica, and of all on average; ``moved``: the share of microbatches that changed
    replicas before."""

    slowest: float
    mean: float
    moved: float = 0.0

    @property
    def spread(self) -> float:
        """Slowest over mean."""
        return self.slowest / self.mean


def work_of(price: Callable[[Batch], tuple[Floats, Floats]], batches: Sequence[Batch]) -> Work:
    """What the microbatches of all replicas are worth; ``price`` see :func:`.balance.microbatch_work`."""
    each = [price(batch) for batch in batches]
    return Work(
        np.concatenate([seconds for seconds, _ in each]), np.concatenate([held for _, held in each]),
        np.repeat(np.arange(len(batches)), [len(batch) for batch in batches]), len(batches),
    )  # fmt: skip


def rearranged(batches: Sequence[Batch], before: Places, after: Places) -> list[tuple[Microbatch, ...]]:
    """The batches once every microbatch is where ``after`` says."""
    flat = [microbatch for batch in batches for microbatch in batch]
    return [tuple(flat[number] for number in line) for line in lines(before, after, len(batches))]


def outcome(
    seconds: Callable[[Batch], float], batches: Sequence[Batch], cost: Floats, moved: float = 0.0,
    longer: Callable[[Batch], float] | None = None, planned: int = PLANNED,
) -> Outcome:  # fmt: skip
    """From what each replica's plan takes. ``cost`` ``[replicas]`` is what their work is worth: of more than
    ``planned`` only some are planned, and the mean is scaled from them by it. ``longer``: seconds under a longer
    search, which the slowest replicas' plans get, one after the other, until the slowest one's is such a plan; the
    others are then taken to gain by it what these did."""
    order = np.argsort(-cost, kind="stable")
    few, most = len(cost) <= planned, planned // 3
    chosen = order if few else np.concatenate([order[:most], order[most :: max(1, len(order) // (2 * most))]])
    took = np.array([seconds(batches[int(r)]) for r in chosen])
    if longer is not None:
        took = _searched_longer(took, [batches[int(r)] for r in chosen], longer)
    mean = float(took.mean()) if few else float((took / cost[chosen])[most:].mean() * cost.mean())
    return Outcome(float(took.max()), mean, moved)


def _searched_longer(took: Floats, batches: Sequence[Batch], longer: Callable[[Batch], float]) -> Floats:
    short, done = took.copy(), np.zeros(len(took), dtype=np.bool_)
    while not done[slowest := int(np.argmax(took))]:
        took[slowest], done[slowest] = min(took[slowest], longer(batches[slowest])), True
    gained = float((took[done] / short[done]).mean())
    return np.where(done, took, took * gained)


def replicated(
    schedule: str, setting: Setting, effort: Effort, replicas: int, balance: Balance, given: Partition | None = None, *,
    searched: Partition | None = None,
) -> list[tuple[Outcome, Outcome]]:  # fmt: skip
    """(as drawn, after the exchange) for every iteration; each takes the next ``replicas`` batches of the setting.

    Microbatches are priced, and replicas planned, under the schedule itself. Raises what :func:`choose_chunks` and the
    schedule raise.
    """
    entry = find_schedule(schedule)
    chunks = choose_chunks(entry, setting, effort, given, searched=searched)
    graphs = setting.graphs(entry, chunks)

    def seconds(batch: Batch) -> float:
        return plan_batch(entry, graphs, batch, effort, chunks.group).iteration_time

    found = []
    for first in range(0, len(setting.batches), replicas):
        batches = [batch.microbatches for batch in setting.batches[first : first + replicas]]
        work = work_of(lambda batch: microbatch_work(graphs.build(tuple(batch), forward_only=False)), batches)
        before = after = outcome(seconds, batches, work.cost(work.replica))
        if balance != "off":
            assignment = assign(work, balance)
            evened = rearranged(batches, work.replica, assignment.replica)
            after = outcome(seconds, evened, assignment.after, float(assignment.moved.mean()))
        found.append((before, after))
    return found
