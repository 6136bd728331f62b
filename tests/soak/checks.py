"""What a soak must show, from what its ranks wrote down. Pure functions: numbers in, faults found out."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

LEAST_ITERATIONS = 200  # below, memory has not settled: growth is reported, not judged
GROWTH_SHARE, GROWTH_BYTES = 0.02, 16e6  # of memory, from the second quarter of a run to its last; the larger counts
STALL_RATIO, STALL_SECONDS = 2.0, 0.02
RELATIVE_LOSS, ABSOLUTE_NORM = 1e-4, 2e-3  # the log prints gradient norms with three decimals

_LINE = re.compile(r"iteration +(\d+)/.* lm loss: ([\d.E+-]+) .*grad norm: ([\d.]+)")


def read_log(text: str) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by iteration, from Megatron's log."""
    return {int(i): (float(loss), float(norm)) for i, loss, norm in _LINE.findall(text)}


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the second quarter and of the last."""
    n = len(values) // 4
    return statistics.median(values[n : 2 * n] or values), statistics.median(values[-n:] or values)


def growth(diary: Sequence[Mapping[str, Any]], who: str) -> tuple[float, float]:
    """Bytes of the ``who`` ("trainer" or "planner") in the second quarter of the run and in the last, medians."""
    values = [float(line[f"{who}_bytes"]) for line in diary if line[f"{who}_bytes"] > 0]
    return quarters(values) if values else (0.0, 0.0)


def faults(
    seen: Mapping[int, tuple[float, float]],
    expected: Mapping[int, tuple[float, float]],
    diaries: Sequence[Sequence[Mapping[str, Any]]],
    iterations: int,
) -> list[str]:
    """Everything that is not as it must be. ``seen`` and ``expected`` are what :func:`read_log` gives for the disturbed
    run and for Megatron's own schedule."""
    found = []
    for name, log in (("disturbed", seen), ("undisturbed", expected)):
        missing = sorted(set(range(1, iterations + 1)) - set(log))
        if missing:
            found.append(f"the {name} run reports no iteration {missing[0]} and {len(missing) - 1} more")
    for i in sorted(set(seen) & set(expected)):
        (loss, norm), (other_loss, other_norm) = seen[i], expected[i]
        if not abs(loss - other_loss) <= RELATIVE_LOSS * abs(other_loss):
            found.append(f"iteration {i}: loss {loss}, undisturbed {other_loss}")
            break
        if not abs(norm - other_norm) <= ABSOLUTE_NORM + RELATIVE_LOSS * other_norm:
            found.append(f"iteration {i}: gradient norm {norm}, undisturbed {other_norm}")
            break
    if iterations < LEAST_ITERATIONS:
        return found
    for rank, diary in enumerate(diaries):
        for who in ("trainer", "planner"):
            early, late = growth(diary, who)
            if late - early > max(GROWTH_SHARE * early, GROWTH_BYTES):
                found.append(f"rank {rank}: the {who} grew from {early / 1e6:.0f} to {late / 1e6:.0f} MB")
        early, late = quarters([float(line["stall_seconds"]) for line in diary])
        if late > STALL_RATIO * early + STALL_SECONDS:
            found.append(f"rank {rank}: training waited {early:.3f} s for a plan, later {late:.3f} s")
    return found
