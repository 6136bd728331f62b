"""Whole training runs of the recorded example, under Megatron's own schedules and under DIP."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from examples.llava_digits.runs import Run, train, training_flags
from tests.forked import forked

SCRIPT = Path(__file__).with_name("recording_digits.py")
SMALL = {
    "--vision-num-layers": "2", "--hidden-size": "48", "--vision-hidden-size": "48", "--eval-iters": "0",
    "--vision-num-attention-heads": "4", "--global-batch-size": "4", "--lr-warmup-iters": "1",
    "--num-workers": "0",
}  # fmt: skip
MEGATRON = ("--decoder-first-pipeline-num-layers", "2")
_ITERATION = re.compile(r"iteration +(\d+)/ *\d+ \|")
_NUMBERS = {name: re.compile(rf" {name}: ([\d.E+-]+) \|") for name in ("lm loss", "grad norm", "loss scale")}
_VALIDATION = re.compile(r"validation loss at (.*?) \|.* lm loss value: ([\d.E+-]+)")


@dataclass(frozen=True)
class Log:
    """What a run left: loss, gradient norm and loss scale by iteration (a skipped one has no loss and no norm), losses
    of evaluations by their place, the text of each rank, and the samples of each rank in the order of their losses."""

    losses: dict[int, float]
    norms: dict[int, float]
    scales: dict[int, float]
    evaluations: dict[str, float]
    text: list[str]
    samples: list[list[dict[str, Any]]]


def run(
    folder: Path,
    *flags: str,
    ranks: int = 2,
    iterations: int = 3,
    dip: bool = True,
    options: dict[str, Any] | None = None,
    without: Sequence[str] = (),
    on_iteration: Callable[[int, Run], Any] = lambda *_: None,
) -> Log:
    """Train and return what the run left in ``folder``; ``without`` names flags of the example to leave out, values and
    all, ``options`` are those of the recorded script. Raises RunFailed when a rank fails."""
    folder.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "dip_megatron.cli", "run"] if dip or any(flag.startswith("--dip-") for flag in flags) else []
    schedule = ["--dip-schedule", "dynamic", "--dip-search-budget", "0.05"] if dip else list(MEGATRON)
    usual = training_flags(iterations)
    for name, value in SMALL.items():
        usual += [name, value]
    for name in without:
        while name in usual:
            place = usual.index(name)
            values = takewhile(lambda word: not word.startswith("--"), usual[place + 1 :])
            del usual[place : place + 1 + len(list(values))]
    os.environ["DIP_TEST"] = json.dumps({"folder": str(folder)} | (options or {}))
    command = [sys.executable, *launcher, str(SCRIPT), *usual, *schedule, *flags]
    try:
        train("run", command, folder, on_iteration, ranks, forked)
    finally:
        del os.environ["DIP_TEST"]
    return read(folder, ranks)


def read(folder: Path, ranks: int, name: str = "run") -> Log:
    """The run's results."""
    texts = [(folder / f"{name}.rank{rank}.log").read_text() for rank in range(ranks)]
    lines = texts[-1].splitlines()
    losses, norms, scales = (
        {
            int(at[1]): float(of[1])
            for line in lines
            if (at := _ITERATION.search(line)) and (of := expression.search(line))
        }
        for expression in _NUMBERS.values()
    )
    evaluations = [found for line in lines if (found := _VALIDATION.search(line))]
    return Log(
        losses,
        norms,
        scales,
        {found[1]: float(found[2]) for found in evaluations},
        texts,
        [_samples(folder / f"samples.rank{rank}.jsonl") for rank in range(ranks)],
    )


def _samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def trained(logs: Sequence[Log]) -> list[int]:
    """Indices of all samples that were trained on, over several runs and all ranks, in ascending order."""
    return sorted(s["index"] for log in logs for rank in log.samples for s in rank if s["train"])
