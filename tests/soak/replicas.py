"""A soak of replicas that exchange microbatches: ``scripts/soak replicas``.

Two replicas of two stages train tiny iterations on drifting data, while exchanges suffer faults. Some end the run: it
must end within a bounded time, and say why; it is started again from its last checkpoint. Whatever an iteration was
trained on last is what counts: every sample must be in exactly one iteration, on one replica, the one of Megatron's
own order of samples. Losses and gradient norms are compared with those of Megatron's own schedule on one rank. What is
done is kept in the folder, so that a soak that was stopped goes on, and checked after each start, so that one that is
cut has shown something.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from dip_megatron.report.tables import table
from examples.llava_digits.runs import SCRIPT, RunFailed, train, training_flags
from tests.forked import forked
from tests.soak.__main__ import TINY
from tests.soak.checks import ABSOLUTE_NORM, RELATIVE_LOSS, read_log
from tests.soak.exchanges import FATAL

RANKS, BATCH = 4, 6
TIMEOUT_SECONDS = 40.0
SILENCE_SECONDS = 2 * TIMEOUT_SECONDS
ALONE = ["--pipeline-model-parallel-size", "1"]
# Searches that would fill an iteration take from training on hosts with few cores, and aren't what is tried here.
DISTURBED = ["--dip-schedule", "dynamic", "--dip-balance", "swap", "--dip-search-budget", "0.01"]
Logs = dict[int, tuple[float, float]]


def soak(iterations: int, every: int, life: int, out: Path, console: Console) -> list[str]:
    """Both runs below ``out``; everything that went wrong."""
    alone, disturbed = out / "undisturbed", out / "disturbed"
    for folder in (alone, disturbed):
        folder.mkdir(parents=True, exist_ok=True)

    def check(reached: int) -> list[str]:
        return wrong(logs_of(disturbed), logs_of(alone), samples_of(disturbed), reached)

    faults = run("undisturbed", ALONE, 1, iterations, 0, iterations, alone, console, lambda _: [])
    faults += run("disturbed", DISTURBED, RANKS, iterations, every, life, disturbed, console, check)
    exchanges = exchanges_of(disturbed)
    rows = [
        ("iterations trained", {"": str(len(samples_of(disturbed)))}),
        ("exchanges in which somebody moved", {"": str(sum(e["moved"] > 0 for e in exchanges))}),
        *((f"nobody moved: {reason}", {"": str(count)})
          for reason, count in Counter(e["reason"] for e in exchanges if e["reason"]).items()),
        ("starts again", {"": str(len(lives(disturbed)) - 1)}),
    ]  # fmt: skip
    console.print(table("Soak of replicas", ("", ""), rows))
    return faults


def run(
    name: str, flags: Sequence[str], ranks: int, iterations: int, every: int, life: int, folder: Path,
    console: Console, check: Callable[[int], list[str]],
) -> list[str]:  # fmt: skip
    """Train to the end, from checkpoint to checkpoint; what went wrong with its ends, and what ``check`` finds wrong
    with the iterations until then."""
    faults: list[str] = []
    done = folder / "done"
    while not faults and not done.exists():
        number = len(list(folder.glob("life*")))
        here = folder / f"life{number}"
        here.mkdir()
        fatal = FATAL[number // 2 % len(FATAL)] if every and number % 2 == 0 else ""
        os.environ |= {
            "SOAK_DIARY": str(here), "SOAK_SAMPLES": str(BATCH * iterations), "SOAK_EVERY": str(every),
            "SOAK_FATAL": fatal, "SOAK_EXCHANGES": str(life // 2), "DIP_TIMEOUT_SECONDS": str(TIMEOUT_SECONDS),
            "DIP_TRACE_DIR": str(here),
        }  # fmt: skip
        command = [
            sys.executable, "-m", "tests.soak.trainer", str(SCRIPT), *training_flags(iterations), *TINY,
            "--global-batch-size", str(BATCH), "--save", str(folder / "saved"), "--load", str(folder / "saved"),
            "--save-interval", str(max(life // 8, 1)), "--exit-interval", str(life), *flags,
        ]  # fmt: skip
        began = last = time.monotonic()

        def say(iteration: int, _: object) -> None:
            nonlocal last
            last = time.monotonic()

        try:
            train("run", command, here, say, ranks, forked)
            ended = "ended in order"
        except RunFailed as error:
            ended = f"failed ({error})"
            if not fatal:
                faults.append(f"{name}, life {number}: {error}")
                break
            text = "".join(path.read_text(errors="replace") for path in here.glob("run.rank*.log"))
            if fatal != "dies" and "the exchange of microbatches between replicas" not in text:
                faults.append(f"{name}, life {number}: a rank that {fatal} is not named as the cause")
            if time.monotonic() - last > SILENCE_SECONDS:
                faults.append(f"{name}, life {number}: ended {time.monotonic() - last:.0f} s after the fault")
        finally:
            end_left_behind(here)
        reached = max(log_of(here), default=0)
        faults += check(reached)
        console.print(f"{name}, life {number} ({fatal or 'no end'}): to iteration {reached} of {iterations} in "
                      f"{time.monotonic() - began:.0f} s, {ended[:120]}; {'; '.join(faults) or 'all right'}",
                      highlight=False)  # fmt: skip
        if reached >= iterations:
            done.touch()
    return faults


def end_left_behind(life: Path) -> None:
    """Processes that Megatron's ranks have started for checkpoints don't notice that a rank has died."""
    mark = f"SOAK_DIARY={life}\0".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            spawned = b"--multiprocessing-fork" in (process / "cmdline").read_bytes()
            if spawned and mark in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


def lives(folder: Path) -> list[Path]:
    """Folders of a run's starts, in their order."""
    return sorted(folder.glob("life*"), key=lambda path: int(path.name.removeprefix("life")))


def log_of(life: Path) -> Logs:
    """Loss and gradient norm by iteration, as the last rank of a start says."""
    last = max(life.glob("run.rank*.log"), key=lambda path: int(path.suffixes[0].removeprefix(".rank")), default=None)
    return {} if last is None else read_log(last.read_text(errors="replace"))


def logs_of(folder: Path) -> Logs:
    """Loss and gradient norm by iteration, of the last life that trained it; without the first two of each life, whose
    losses Megatron's log mixes after a restart."""
    logs: Logs = {}
    for life in lives(folder):
        log = log_of(life)
        first = min(log, default=0)
        logs |= {i: values for i, values in log.items() if i > first + 1}
    return logs


def samples_of(folder: Path) -> dict[int, list[int]]:
    """Samples of each iteration, on all replicas, as it was trained last; only the last stage's ranks are asked."""
    found: dict[int, list[int]] = {}
    for life in lives(folder):
        here: dict[int, list[int]] = {}
        ranks: Counter[int] = Counter()
        for rank in range(RANKS // 2, RANKS):
            path = life / f"samples.rank{rank}.jsonl"
            for line in map(json.loads, path.read_text().splitlines() if path.is_file() else []):
                here.setdefault(line["iteration"], []).extend(line["samples"])
                ranks[line["iteration"]] += 1
        # One that a fault has cut is trained again by the next life, from the last checkpoint.
        found |= {i: samples for i, samples in here.items() if ranks[i] == RANKS // 2}
    return found


def exchanges_of(folder: Path) -> list[dict[str, Any]]:
    """Reports of all exchanges, of the first replica."""
    lines = [
        json.loads(line)
        for life in lives(folder)
        if (life / "iterations.jsonl").is_file()
        for line in (life / "iterations.jsonl").read_text().splitlines()
    ]
    return [line["exchange"] for line in lines if line["exchange"]]


def wrong(seen: Logs, expected: Logs, samples: Mapping[int, Sequence[int]], iterations: int) -> list[str]:
    """Everything that is not as it must be."""
    faults = []
    for i in range(1, iterations + 1):
        right = list(range(BATCH * (i - 1), BATCH * i))
        if sorted(samples.get(i, ())) != right:
            faults.append(f"iteration {i} trained on samples {sorted(samples.get(i, ()))}, not on {right}")
            break
    common = sorted(set(seen) & set(expected))
    if len(common) < iterations // 2:
        faults.append(f"only {len(common)} iterations can be compared")
    for i in common:
        (loss, norm), (other_loss, other_norm) = seen[i], expected[i]
        if abs(loss - other_loss) > RELATIVE_LOSS * abs(other_loss):
            faults.append(f"iteration {i}: loss {loss}, undisturbed {other_loss}")
            break
        if abs(norm - other_norm) > ABSOLUTE_NORM + RELATIVE_LOSS * other_norm:
            faults.append(f"iteration {i}: gradient norm {norm}, undisturbed {other_norm}")
            break
    return faults


@click.command()
@click.option("--iterations", default=2000, show_default=True, type=click.IntRange(min=10), help="per run")
@click.option("--every", default=10, show_default=True, type=click.IntRange(min=2), help="exchanges between faults")
@click.option("--life", default=200, show_default=True, type=click.IntRange(min=10), help="iterations before an end")
@click.option("--out", default=Path("out/soak-replicas"), show_default=True, type=click.Path(path_type=Path))
def main(iterations: int, every: int, life: int, out: Path) -> None:
    """Train two replicas that exchange microbatches under faults, and compare with Megatron's own schedule."""
    found = soak(iterations, every, life, out, Console())
    for fault in found:
        click.echo(f"soak: {fault}", err=True)
    if found:
        raise SystemExit(1)
    click.echo("soak: no sample lost, none twice, no hang; Megatron's losses and gradient norms")


if __name__ == "__main__":
    main()
