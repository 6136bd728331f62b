"""What the quickstart ends with: the runs of the same batches side by side."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dip_megatron.report.tables import seconds, table

from .runs import Run, RunFailed

WARM_UP = 5  # iterations left out of timings: memory is allocated, and a dynamic planner starts
EARLY = 10
DIP = "DIP"


def planner_lines(folder: Path) -> list[dict[str, Any]]:
    """One object per iteration, as written below ``--dip-trace-dir``, warm-up left out."""
    path = folder / "iterations.jsonl"
    if not path.is_file():
        raise RunFailed(f"DIP left no {path}; was the disk full?")
    return [json.loads(line) for line in path.read_text().splitlines() if line][WARM_UP:]


def gains(runs: Mapping[str, Run]) -> dict[str, float]:
    """Of each of Megatron's schedules, its time over DIP's: the median over the batches that both have trained on."""
    dip = runs[DIP].seconds
    timed = [i for i in dip if i > WARM_UP] or list(dip)
    return {
        name: statistics.median(run.seconds[i] / dip[i] for i in timed) for name, run in runs.items() if name != DIP
    }


def compare(runs: Mapping[str, Run], planner: Sequence[dict[str, Any]]) -> Any:
    """A column per schedule, DIP's last. Times are medians, losses are compared with those of the first, relatively."""
    first = next(iter(runs.values()))
    last = max(first.losses)

    def each(text: Callable[[Run], str]) -> dict[str, str]:
        return {name: text(run) for name, run in runs.items()}

    def of_others(text: Callable[[Run], str]) -> dict[str, str]:
        return {name: text(run) for name, run in runs.items() if run is not first}

    def of_planner(value: Callable[[dict[str, Any]], float], text: Callable[[float], str]) -> dict[str, str]:
        return {DIP: text(statistics.median(map(value, planner)))} if planner else {}

    def difference(run: Run, until: int) -> str:
        # Sums in another order differ in the last bits, and training amplifies that: early iterations tell.
        return f"{max(abs(run.losses[i] - loss) / loss for i, loss in first.losses.items() if i <= until):.1e}"

    percent, times = "{:.1%}".format, "{:.3f} x".format
    return table(
        f"The same {last} batches, {len(runs)} times",
        ("", *runs),
        [
            ("an iteration", each(lambda run: seconds(statistics.median(_timed(run))))),
            ("Megatron's time over DIP's", {name: f"{gain:.2f} x" for name, gain in gains(runs).items()}),
            ("loss, first iteration", each(lambda run: f"{run.losses[1]:.6f}")),
            (f"loss, iteration {last}", each(lambda run: f"{run.losses[last]:.6f}")),
            (f"loss difference, first {EARLY}", of_others(lambda run: difference(run, EARLY))),
            ("loss difference, all", of_others(lambda run: difference(run, last))),
            ("held-out digits read", each(lambda run: "–" if run.accuracy is None else percent(run.accuracy))),
            ("measured over predicted", of_planner(_measured_over_predicted, times)),
            ("bubbles, planned", of_planner(lambda line: line["bubble_ratio_planned"], percent)),
            ("bubbles, measured", of_planner(lambda line: line["bubble_ratio_measured"], percent)),
            ("plan over its lower bound", of_planner(_over_bound, times)),
            ("making a plan", of_planner(lambda line: line["plan_seconds"], seconds)),
            ("training waits for a plan", of_planner(lambda line: line["stall_seconds"], seconds)),
        ],
    )


def _timed(run: Run) -> list[float]:
    return [value for i, value in run.seconds.items() if i > WARM_UP] or list(run.seconds.values())


def _measured_over_predicted(line: Mapping[str, Any]) -> float:
    return float(line["iteration_seconds"] / line["predicted_seconds"])


def _over_bound(line: Mapping[str, Any]) -> float:
    return float(line["predicted_seconds"] / line["lower_bound"]) if line["lower_bound"] > 0 else 1.0
