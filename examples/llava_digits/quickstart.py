"""Train the same small LLaVA on the same batches twice, under Megatron's own schedule and under DIP, and compare.

``scripts/quickstart`` installs what this needs and runs it. Two CPU ranks, a few minutes, no GPU.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dip_megatron.report.tables import seconds, table

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "pretrain_llava_digits.py"
ROOT = HERE.parent.parent
RANKS = 2
WARM_UP = 5  # iterations left out of timings: memory is allocated, and a dynamic planner starts
EARLY = 10
SILENCE = 300.0  # seconds without a new line until a run counts as stuck
# What upstream offers a LLaVA: 1F1B with the ViT on the first stage. Of the language model's splits, 1 + 3 layers takes
# as long as 2 + 2 (medians of 401 and 400 ms an iteration on two cores), 3 + 1 longer.
MEGATRON_FLAGS = ("--decoder-first-pipeline-num-layers", "2")

_ITERATION = re.compile(
    r"iteration +(\d+)/ *\d+ .*elapsed time per iteration \(ms\): ([\d.]+).* lm loss: ([\d.E+-]+)"
    r"(?:.* digit accuracy: ([\d.E+-]+))?"
)
_HELD_OUT = re.compile(r"on test set .*digit accuracy value: ([\d.E+-]+)")


class RunFailed(Exception):
    """A training run that ended early; the message says where to look."""


@dataclass
class Run:
    """What Megatron's log of one run says: loss and seconds by iteration, accuracy on images never trained on."""

    losses: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    accuracy: float | None = None

    def read(self, line: str) -> int | None:
        """Take note of a line; the number of the iteration it reports, if any."""
        if held_out := _HELD_OUT.search(line):
            self.accuracy = float(held_out[1])
        found = _ITERATION.search(line)
        if found is None:
            return None
        iteration = int(found[1])
        self.seconds[iteration] = float(found[2]) / 1e3
        self.losses[iteration] = float(found[3])
        return iteration


def training_flags(iterations: int) -> list[str]:
    """The flags of both runs."""
    flags = shlex.split((HERE / "tiny.args").read_text(), comments=True)
    return [
        *flags, "--train-iters", str(iterations), "--pipeline-model-parallel-size", str(RANKS), "--weights-by-name",
    ]  # fmt: skip


class Process(Protocol):
    """What is asked of a rank's process: methods of subprocess.Popen."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


def environment(ranks: int) -> list[dict[str, str]]:
    """Environment variables of each of ``ranks`` processes on this machine."""
    # Below the ports of outgoing connections: rank 0 listens seconds from now, and one of those could be taken by then.
    port = random.SystemRandom().randrange(10_000, 30_000)
    common = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return [{**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def end(processes: Sequence[Process]) -> None:
    """End whatever of them still runs."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def started(command: Sequence[str], logs: Sequence[Path]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One process per rank and log, ended with the block whatever happens."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for log, place in zip(logs, environment(len(logs)), strict=True):
            with log.open("wb") as file:
                processes.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=place))
        yield processes
    finally:
        end(processes)


def train(
    name: str,
    command: Sequence[str],
    out: Path,
    on_iteration: Callable[[int, Run], Any],
    ranks: int = RANKS,
    start: Callable[[Sequence[str], Sequence[Path]], AbstractContextManager[Sequence[Process]]] = started,
) -> Run:
    """Run ``command`` on every rank, logging to ``out/NAME.rankR.log``.

    Raises RunFailed when a rank fails or the run falls silent.
    """
    run, text = Run(), ""
    logs = [out / f"{name}.rank{rank}.log" for rank in range(ranks)]
    with start(command, logs) as processes, logs[-1].open() as lines:
        heard = time.monotonic()
        while True:
            codes = [process.poll() for process in processes]
            text += lines.read()
            *complete, text = text.split("\n")
            for line in complete:
                heard = time.monotonic()
                iteration = run.read(line)
                if iteration is not None:
                    on_iteration(iteration, run)
            for log, code in zip(logs, codes, strict=True):
                if code not in (None, 0):
                    raise RunFailed(f"{name}: a rank ended with code {code}: {_last_words(log)} (all of it: {log})")
            if all(code == 0 for code in codes):
                return run
            if time.monotonic() - heard > SILENCE:
                raise RunFailed(f"{name}: no sign of life for {SILENCE:.0f} s; look into {logs[0]} and {logs[-1]}")
            time.sleep(0.1)


def _last_words(log: Path) -> str:
    """The last line that names an error, or just the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"Error|dip:|error:", line)]
    return (named or lines or ["no output"])[-1][:300]


def planner_lines(folder: Path) -> list[dict[str, Any]]:
    """One object per iteration, as written below ``--dip-trace-dir``, warm-up left out."""
    path = folder / "iterations.jsonl"
    if not path.is_file():
        raise RunFailed(f"DIP left no {path}; was the disk full?")
    return [json.loads(line) for line in path.read_text().splitlines() if line][WARM_UP:]


def compare(megatron: Run, dip: Run, planner: Sequence[dict[str, Any]]) -> Any:
    """The table the quickstart ends with."""
    last = max(megatron.losses)
    timed = [i for i in megatron.seconds if i > WARM_UP] or list(megatron.seconds)
    times = {name: statistics.median(run.seconds[i] for i in timed) for name, run in _named(megatron, dip)}
    ratio = statistics.median(megatron.seconds[i] / dip.seconds[i] for i in timed)
    # Sums in another order differ in the last bits, and training amplifies that: early iterations tell if they agree.
    difference = {i: abs(dip.losses[i] - loss) / loss for i, loss in megatron.losses.items()}
    early = max(gap for i, gap in difference.items() if i <= EARLY)

    def both(text: Callable[[Run], str]) -> dict[str, str]:
        return {name: text(run) for name, run in _named(megatron, dip)}

    def of_planner(key: str, text: Callable[[float], str]) -> dict[str, str]:
        return {"DIP": text(statistics.median(line[key] for line in planner))} if planner else {}

    return table(
        "The same batches, twice",
        ("", "Megatron 1F1B", "DIP"),
        [
            ("loss, first iteration", both(lambda run: f"{run.losses[1]:.6f}")),
            (f"loss, iteration {last}", both(lambda run: f"{run.losses[last]:.6f}")),
            (f"largest relative difference, first {EARLY}", {"DIP": f"{early:.1e}"}),
            ("largest relative difference, all", {"DIP": f"{max(difference.values()):.1e}"}),
            ("digits read, held-out images", both(lambda run: "–" if run.accuracy is None else f"{run.accuracy:.1%}")),
            ("an iteration (median)", {name: seconds(value) for name, value in times.items()}),
            ("Megatron's time over DIP's, same batches", {"DIP": f"{ratio:.2f} x"}),
            ("making a plan (median)", of_planner("plan_seconds", seconds)),
            ("training waits for a plan (median)", of_planner("stall_seconds", seconds)),
            ("plan over its lower bound (median)", _plan_over_bound(planner)),
            ("bubbles, planned (median)", of_planner("bubble_ratio_planned", "{:.1%}".format)),
            ("bubbles, measured (median)", of_planner("bubble_ratio_measured", "{:.1%}".format)),
        ],
    )


def _named(megatron: Run, dip: Run) -> tuple[tuple[str, Run], tuple[str, Run]]:
    return ("Megatron 1F1B", megatron), ("DIP", dip)


def _plan_over_bound(planner: Sequence[dict[str, Any]]) -> dict[str, str]:
    ratios = [line["predicted_seconds"] / line["lower_bound"] for line in planner if line["lower_bound"] > 0]
    return {"DIP": f"{statistics.median(ratios):.3f} x"} if ratios else {}


@click.command()
@click.option("--iterations", default=100, show_default=True, type=click.IntRange(min=10), help="per run")
@click.option(
    "--out",
    default=Path("out/quickstart"),
    show_default=True,
    type=click.Path(path_type=Path),
    help="folder of results",
)
@click.option("--dip-config", type=click.Path(path_type=Path, exists=True), help="YAML file for the DIP run")
@click.option("--only", type=click.Choice(["megatron", "dip"]), help="one of the two runs, no comparison")
def main(iterations: int, out: Path, dip_config: Path | None, only: str | None) -> None:
    """Train a small LLaVA to read digits under Megatron's 1F1B and under DIP."""
    console = Console()
    folder = out / "dip"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"--out {out}: {error.strerror}; name a folder that can be written") from error
    for stale in ("iterations.jsonl", "trace.json", "timeline.png"):
        (folder / stale).unlink(missing_ok=True)
    flags = training_flags(iterations)
    dip_flags = ["--dip-schedule", "dynamic", "--dip-trace-dir", str(folder)]
    if dip_config is not None:
        dip_flags += ["--dip-config", str(dip_config)]
    commands = {
        "megatron": [sys.executable, str(SCRIPT), *flags, *MEGATRON_FLAGS],
        "dip": [sys.executable, "-m", "dip_megatron.cli", "run", str(SCRIPT), *flags, *dip_flags],
    }
    titles = {"megatron": "Megatron 1F1B", "dip": "DIP"}
    runs: dict[str, Run] = {}
    columns = (
        TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )  # fmt: skip
    try:
        with Progress(*columns, console=console) as progress:
            for name in [only] if only else list(commands):
                task = progress.add_task(titles[name], total=iterations, state="starting")

                def show(iteration: int, run: Run, task: Any = task) -> None:
                    state = f"loss {run.losses[iteration]:.3f}, {seconds(run.seconds[iteration])} an iteration"
                    progress.update(task, completed=iteration, state=state)

                runs[name] = train(name, commands[name], out, show)
        if only:
            run = runs[only]
            read = "–" if run.accuracy is None else f"{run.accuracy:.1%}"
            console.print(f"loss {run.losses[max(run.losses)]:.6f}, digits read on held-out images {read}")
            return
        console.print(compare(runs["megatron"], runs["dip"], planner_lines(folder)))
    except RunFailed as error:
        raise click.ClickException(str(error)) from error
    console.print("The last iteration, planned beside measured:")
    console.print(f"  trace    {folder / 'trace.json'}  (open it at https://ui.perfetto.dev)", soft_wrap=True)
    console.print(f"  picture  {folder / 'timeline.png'}", soft_wrap=True)


if __name__ == "__main__":
    main()
