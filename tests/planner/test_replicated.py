"""What a job of several replicas takes, from what their plans take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from dip_megatron.describe.workload import Microbatch
from dip_megatron.planner.replicated import PLANNED, outcome


def batches(*tokens: float) -> list[list[Microbatch]]:
    return [[Microbatch(int(1000 * t))] for t in tokens]


def took(batch: Sequence[Microbatch]) -> float:
    return batch[0].tokens / 1000


def test_the_slowest_counts() -> None:
    found = outcome(took, batches(1.0, 3.0, 2.0), np.array([1.0, 3.0, 2.0]))
    assert (found.slowest, found.mean, found.spread) == (3.0, 2.0, 1.5)


def test_the_plans_of_the_slowest_are_searched_longer_until_one_of_these_is_the_slowest() -> None:
    asked = []

    def longer(batch: Sequence[Microbatch]) -> float:
        asked.append(took(batch))
        return 0.9 * took(batch)

    found = outcome(took, batches(1.0, 2.0, 1.9, 1.5), np.ones(4), longer=longer)
    assert asked == [2.0, 1.9]
    assert found.slowest == pytest.approx(1.8)
    assert found.mean == pytest.approx(0.9 * (1.0 + 2.0 + 1.9 + 1.5) / 4)  # the others are taken to gain as much
    worse = outcome(took, batches(1.0, 2.0), np.ones(2), longer=lambda batch: 2 * took(batch))
    assert (worse.slowest, worse.mean) == (2.0, 1.5)  # a longer search never loses what was found


def test_of_many_replicas_some_are_planned() -> None:
    tokens = np.linspace(1.0, 2.0, 200)
    asked = []

    def seconds(batch: Sequence[Microbatch]) -> float:
        asked.append(batch)
        return 1.1 * took(batch)

    found = outcome(seconds, batches(*tokens), tokens)
    assert found.slowest == pytest.approx(2.2)
    assert found.mean == pytest.approx(1.65, rel=1e-3)
    assert len(asked) <= PLANNED
