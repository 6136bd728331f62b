"""Plans of all batches of a setting, and their mean time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dip_megatron.describe.model import Partition
from dip_megatron.planner.facade import DoesNotFitError, Effort, PlanningResult, Setting, make_planner
from dip_megatron.schedulers.common import BaselineError


def plan_batches(
    name: str, setting: Setting, effort: Effort, partition: Partition | None, searched: Partition | None = None
) -> list[PlanningResult] | None:
    """Plan every batch of ``setting`` under the schedule ``name``.

    Args:
        name: a registered schedule.
        setting: the model, its cluster and its batches.
        effort: how long to search for a plan.
        partition: the partition of all segmented schedules; None: each schedule's usual one.
        searched: where the usual one is searched for, the result of that search; None: search.

    Returns:
        One result for each batch; None where the schedule can't run them, or not within memory.
    """
    try:
        planner = make_planner(name, setting, effort, partition, searched=searched)
        results = [planner(batch.microbatches) for batch in setting.batches]
    except (BaselineError, DoesNotFitError):
        return None
    return results if all(result.fits for result in results) else None


def mean_seconds(results: Sequence[PlanningResult]) -> float:
    """Mean simulated seconds of an iteration."""
    return float(np.mean([result.iteration_time for result in results]))
