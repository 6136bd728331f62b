"""Edit every file that a user can hand in at random, run the verb that reads it, and see that each is used or refused.

    scripts/deep_test                      # this and the deep properties
    python -m tests.edited_files --count 500 --seed 3

One to three edits a file: values become others of every kind and size, keys go, come or change, entries repeat, text is
cut. A file has to be used (exit status 0), found faulty (1, by ``dip check``) or refused in one line (2). A traceback,
a message of several lines and a verb that does not end are failures: they are printed, and the status is 1.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from dip_megatron import cli
from dip_megatron.config import DipConfig
from dip_megatron.describe.files import resolve
from dip_megatron.planner.warm import warm_up_plans
from dip_megatron.schedulers.dip.engine import warm_up

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 60  # of computing: on a busy machine a minute of the clock is no fault of a verb
LIMIT_WAIT_SECONDS = 1800.0
LIMIT_BYTES = 8 << 30
BRIEF = ["--iterations", "1", "--microbatches", "4"]
SEARCH = ["--budget", "0.05", "--partition-budget", "0.05", "--workers", "1"]
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 17, 10**4, 10**6, 10**9, 2**31, 2**63, 2**80, 1e30, -1e30, 1e-30, 0.5,
    float("inf"), float("-inf"), float("nan"), "", "x", "1", "none", [], {}, [1], [[1]], {"x": 1},
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """Files of one kind: their sound ``texts``, the ending of their names, and the ``verb`` that reads one."""

    name: str
    suffix: str
    texts: Sequence[str]
    verb: Callable[[str], list[str]]


def edited(text: str, suffix: str, draw: random.Random) -> str:
    """``text`` after one to three edits of what it says, or of its characters."""
    if draw.random() < 0.1:
        place = draw.randrange(len(text))
        return text[:place] + draw.choice(["", "\x00", "é", "\t", "[", "{{", ": :", text[place:] * 2])
    lines = suffix == ".jsonl"
    data = [json.loads(line) for line in text.splitlines()] if lines else load(text, suffix)
    for _ in range(draw.randint(1, 3)):
        data = edit(data, draw)
    if lines:
        return "".join(json.dumps(line) + "\n" for line in data) if isinstance(data, list) else json.dumps(data)
    return json.dumps(data) if suffix == ".json" else yaml.safe_dump(data, sort_keys=False)


def load(text: str, suffix: str) -> Any:
    """What a file of that ending says."""
    return json.loads(text) if suffix == ".json" else yaml.safe_load(text)


def edit(data: Any, draw: random.Random) -> Any:
    """A copy with one change at a place drawn from all depths alike."""
    data = copy.deepcopy(data)
    node, depth = data, draw.randint(0, 6)
    while depth and (inner := [v for v in values(node) if isinstance(v, dict | list) and v]):
        node, depth = draw.choice(inner), depth - 1
    if not isinstance(node, dict | list) or not node:
        return draw.choice(STRANGE)
    key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
    match draw.choice(["strange", "strange", "number", "number", "drop", "add", "repeat", "swap"]):
        case "strange":
            node[key] = draw.choice(STRANGE)
        case "number":
            old = node[key]
            if isinstance(old, int | float) and not isinstance(old, bool):
                node[key] = draw.choice([old + 1, old - 1, -old, old * 1000, old / 7, old * 2, old // 2])
            else:
                node[key] = draw.choice(STRANGE)
        case "drop":
            del node[key]
        case "add" if isinstance(node, dict):
            node[draw.choice(["x", "kind", "name", "version", "layers"])] = draw.choice(STRANGE)
        case "repeat" if isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        case _:
            other = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
            node[key], node[other] = node[other], node[key]
    return data


def values(node: Any) -> list[Any]:
    """What a mapping or a list holds."""
    return list(node.values()) if isinstance(node, dict) else list(node) if isinstance(node, list) else []


def invoke(arguments: list[str]) -> str | None:
    """Run one verb; what is wrong with how it ended, if anything."""
    if arguments[0] == "config":
        try:
            DipConfig.load(Path(arguments[1]), {})
        except ValueError as error:
            return None if "\n" not in str(error) else f"a message of several lines: {error}"
        return None
    status, said = run(arguments)
    if status == 2 and len(said.splitlines()) != 1:
        return f"refused in {len(said.splitlines())} lines: {said[:300]}"
    return None if status in (0, 1, 2) else f"exit status {status}"


def run(arguments: list[str]) -> tuple[Any, str]:
    """Exit status of ``dip ARGUMENTS``, and what it said on stderr; any other exception passes."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            cli.main(arguments)
        except SystemExit as end:
            return end.code or 0, said.getvalue().strip()
    raise AssertionError("dip has to exit")


@contextlib.contextmanager
def outcomes() -> Iterator[Callable[[list[str]], str | None]]:
    """:func:`outcome`, forked from a process of one thread. A fork of the caller might wait for a lock that another of
    its threads held, and its memory would count all that is loaded here."""
    server = subprocess.Popen(
        [sys.executable, "-c", "from tests.edited_files import serve; serve()"], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    with server:
        assert server.stdin is not None
        assert server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        def ask(arguments: list[str]) -> str | None:
            print(json.dumps(arguments), file=stdin, flush=True)
            answer: str | None = json.loads(stdout.readline())
            return answer

        yield ask


def serve() -> None:
    """The outcome of each line of arguments that comes, until no more do."""
    warm_up()
    warm_up_plans()
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # what a verb may write is no answer
        for line in sys.stdin:
            print(json.dumps(outcome(json.loads(line))), file=out, flush=True)


def outcome(arguments: list[str]) -> str | None:
    """As :func:`invoke`, in a fork that may take so much time and memory, and no more."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS + 5))
        try:
            wrong = invoke(arguments)
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
        os.write(writing, (wrong or "").encode()[:4000])
        os._exit(0)
    os.close(writing)
    try:
        if not select.select([reading], [], [], LIMIT_WAIT_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
            return f"did not end within {LIMIT_WAIT_SECONDS:.0f} s"
        said = os.read(reading, 4096).decode(errors="replace")
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return f"did not end within {LIMIT_SECONDS} s of computing"
    return f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else said or None


def kinds(folder: Path) -> list[Kind]:
    """Every kind of file, with sound ones made where none is shipped."""

    def shipped(kind: str, *names: str) -> list[str]:
        return [resolve(kind, name).read_text(encoding="utf-8") for name in names]

    def made(*arguments: str) -> None:
        status, said = run(list(arguments))
        if status:
            raise click.ClickException(said)

    setting = ["--model", "vlm-s", "--cluster", "h100", "--workload", "vlm-mix"]
    partition, plans = folder / "partition.yaml", folder / "plans.jsonl"
    made("partition", *setting, *BRIEF, "--budget", "0.5", "--out", str(partition))
    made("plan", *setting, *BRIEF, *SEARCH, "--partition", str(partition), "--out", str(plans))
    costs = {
        "version": 1, "device": "x", "efficiency": {"matmul": [[1e9, 0.3], [1e12, 0.7]]},
        "measured": [
            {"module": "vision", "part": "layer", "tokens": [169, 1690], "forward": [1e-3, 9e-3],
             "activation": [1e6, 1e7]},
        ],
        "scale": [{"module": "*", "part": "layer", "quantity": "forward", "factor": 1.1}],
        "static_bytes": [], "memory_limit": 8e10,
    }  # fmt: skip
    batch = {
        "microbatches": [{"text_tokens": 900, "images": [169, 169], "sequences": [500, 738]}, {"text_tokens": 8192}]
    }
    clips = {"microbatches": [{"clips": [{"text_tokens": 40, "frames": 32, "height": 256, "width": 256}]}]}
    training = {
        "schedule": "dynamic", "modules": {"vision": {"layers": [[2, 2]], "unit_size": 4}, "language": {"segments": 2}},
        "cluster": "h100", "planner_workers": 1, "search_budget": 0.5, "recompute": True, "memory_limit": 8e10,
        "timeout_seconds": 60.0,
    }  # fmt: skip
    brief = [*BRIEF, *SEARCH]
    t2v = ["plan", "--model", "t2v-s", "--cluster", "h100", *brief]
    cut = ["--partition", str(partition)]
    vlm = ["plan", *setting[:4], *brief, *cut]
    documents = shipped("workloads", "vlm-mix", "vlm-dynamic", "vlm-documents")
    found = [plans.read_text(encoding="utf-8")]
    return [
        Kind("model", ".yaml", shipped("models", "vlm-s"), lambda f: ["plan", "--model", f, *setting[2:], *brief]),
        Kind("model of clips", ".yaml", shipped("models", "t2v-s"),
             lambda f: ["plan", "--model", f, "--cluster", "h100", "--workload", "t2v-mix", *brief]),
        Kind("cluster", ".yaml", shipped("clusters", "h100", "cpu"),
             lambda f: ["plan", *setting[:2], "--cluster", f, *setting[4:], *brief, *cut]),
        Kind("mix", ".yaml", documents, lambda f: [*vlm, "--workload", f]),
        Kind("mix of clips", ".yaml", shipped("workloads", "t2v-mix"), lambda f: [*t2v, "--workload", f]),
        Kind("workload", ".jsonl", [json.dumps(batch) + "\n"], lambda f: [*vlm, "--workload", f]),
        Kind("workload of clips", ".jsonl", [json.dumps(clips) + "\n"], lambda f: [*t2v, "--workload", f]),
        Kind("partition", ".yaml", [partition.read_text(encoding="utf-8")],
             lambda f: ["plan", *setting, *brief, "--partition", f]),
        Kind("costs", ".json", [json.dumps(costs)], lambda f: [*vlm, *setting[4:], "--costs", f]),
        Kind("plans", ".jsonl", found, lambda f: ["check", f]),
        Kind("plans to draw", ".jsonl", found, lambda f: ["trace", f, "--out", str(folder / "trace.json")]),
        Kind("training", ".yaml", [yaml.safe_dump(training)], lambda f: ["config", f]),
    ]  # fmt: skip


@click.command()
@click.option("--count", default=50, show_default=True, type=click.IntRange(min=1), help="Edited files of each kind.")
@click.option("--seed", default=0, show_default=True, help="Of the edits.")
@click.option("--seconds", type=click.FloatRange(min=1), help="Stop after so many seconds, whatever --count says.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for files that were neither used nor refused.")
def main(count: int, seed: int, seconds: float | None, keep: Path | None) -> None:
    """Hand in files with random edits; fail if any is neither used nor refused in one line."""
    began, tried, failed = time.monotonic(), Counter[str](), 0
    with tempfile.TemporaryDirectory() as name, outcomes() as outcome_of:
        folder = Path(name)
        every = kinds(folder)
        for number in range(count):
            for kind in every:
                if seconds is not None and time.monotonic() - began > seconds:
                    break
                draw = random.Random(f"{seed} {kind.name} {number}")
                text = edited(draw.choice(list(kind.texts)), kind.suffix, draw)
                file = folder / f"edited{kind.suffix}"
                file.write_text(text, encoding="utf-8")
                wrong = outcome_of(kind.verb(str(file)))
                tried[kind.name] += 1
                if wrong is not None:
                    failed += 1
                    click.echo(f"{kind.name}, seed {seed}, number {number}: {wrong}")
                    if keep is not None:
                        keep.mkdir(parents=True, exist_ok=True)
                        (keep / f"{kind.name.replace(' ', '-')}-{seed}-{number}{kind.suffix}").write_text(text)
    told = ", ".join(f"{n} {kind}" for kind, n in tried.items())
    click.echo(f"{sum(tried.values())} edited files ({told}): {failed} neither used nor refused in one line")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
