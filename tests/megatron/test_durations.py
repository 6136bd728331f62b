"""How long a plan may be searched for: what the running iteration leaves."""

import time

import pytest

from dip_megatron.megatron.durations import Durations


def test_one_iteration_that_waited_leaves_the_next_no_more_time_than_usual() -> None:
    durations, now = Durations(), time.perf_counter()
    assert durations.left(now) <= 0.0
    for seconds in (20.0, 9000.0):
        durations.add(seconds)
    assert durations.left(now) <= 20.0
    durations.add(20.0)
    assert durations.left(now) <= 20.0


def test_iterations_that_have_become_longer_or_shorter_are_believed() -> None:
    durations, now = Durations(), time.perf_counter()
    for seconds in (20.0, 9000.0, 9000.0):
        durations.add(seconds)
    assert durations.left(now) == pytest.approx(9000.0, abs=4000.0)
    durations.add(20.0)
    assert durations.left(now) <= 20.0
