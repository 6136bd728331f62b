"""Tokens of packed sequences that scripts count as they read them, for the throughput in Megatron's log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .names import Name, Topic

_TRAINING, _SUMS, _COUNTS = "megatron.training.training", "_seqlen_stats_in_iteration", "_seqlen_stats_active"
TOPIC = Topic(
    "throughput of packed sequences in Megatron's log",
    "megatron.training",
    "0.19.2",
    "--log-throughput counts packed sequences that are read ahead, and more than once",
    tuple(Name(f"{_TRAINING}:{name}", first="0.19") for name in (_SUMS, _COUNTS)),
)


@dataclass
class Counted:
    """The sums of one or more calls of a script's ``forward_step``; None where it counts nothing."""

    sums: torch.Tensor | None = None


@contextmanager
def set_aside() -> Iterator[Counted]:
    """Within, what is counted doesn't go to the iteration that runs; afterwards it is in what this gives."""
    counted, training = Counted(), _training()
    if training is None:
        yield counted
        return
    before = getattr(training, _SUMS), getattr(training, _COUNTS)
    _set(training, None, False)
    try:
        yield counted
    finally:
        counted.sums = getattr(training, _SUMS) if getattr(training, _COUNTS) else None
        _set(training, *before)


def count(counted: Counted) -> None:
    """Let it go to the iteration that runs."""
    training = _training()
    if training is not None and counted.sums is not None:
        known = getattr(training, _SUMS)
        _set(training, counted.sums if known is None else known + counted.sums, True)


def _training() -> Any:
    """The module that counts, if the loop is Megatron's and counts at all."""
    module = sys.modules.get(_TRAINING)
    return module if hasattr(module, _SUMS) and hasattr(module, _COUNTS) else None


def _set(training: Any, sums: torch.Tensor | None, counts: bool) -> None:
    setattr(training, _SUMS, sums)
    setattr(training, _COUNTS, counts)
