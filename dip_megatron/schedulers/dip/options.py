"""What a search may do, and what it found."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.order import Schedule


@dataclass(frozen=True)
class SearchOptions:
    """Switches for ablations; all on is the best. ``split_backward``: input and weight gradients apart.
    ``recompute``, ``offload``: strategies whose names say so; without both every stage uses its fastest candidate.
    ``reorder``: the order of microbatches is searched rather than taken as it comes. ``sequences``: local search over
    the explicit orders at the end. ``gap``: stop when the time is within this share of the lower bound. ``patience``:
    end each part of a timed search after so many schedules without a better one; None: use all of its time."""

    split_backward: bool = True
    recompute: bool = True
    offload: bool = True
    reorder: bool = True
    sequences: bool = True
    gap: float = 1e-4
    patience: int | None = None


@dataclass(frozen=True, eq=False)
class SearchResult:
    """``schedule`` with its ``iteration_time`` and a proven ``lower_bound`` (both seconds); the number of schedules
    tried; ``history``: (seconds since the start, iteration time) of each improvement."""

    schedule: Schedule
    iteration_time: float
    lower_bound: float
    evaluations: int
    seconds: float
    history: tuple[tuple[float, float], ...]
    workers: int
    seed: int
