"""Seconds of a few calls in a row, on the device that does the work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from ..compat.tensors import keep_busy

_HEAD_START = 40_000_000
"""Clock cycles for which the GPU sleeps, so that the host has given it everything before it begins: about 20 ms. What
is measured is then the device's time, as in training, where the host runs ahead."""


def measure(
    steps: Sequence[Callable[[], None]], device: torch.device, *, repeats: int = 5, warm_up: int = 2
) -> list[float]:
    """Median seconds of each of ``steps``, which run one after the other, ``repeats`` times after ``warm_up`` runs."""
    runs = [_once(steps, device) for _ in range(warm_up + repeats)][warm_up:]
    return [statistics.median(run[i] for run in runs) for i in range(len(steps))]


def _once(steps: Sequence[Callable[[], None]], device: torch.device) -> list[float]:
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for step in steps:
            step()
            marks.append(time.perf_counter())
        return [b - a for a, b in pairwise(marks)]
    torch.cuda.synchronize(device)
    keep_busy(_HEAD_START)
    events: list[Any] = [_event()]
    for step in steps:
        step()
        events.append(_event())
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
