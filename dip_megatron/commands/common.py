"""What the planning verbs share: options, errors on one line, progress, and the setting they work on."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import click

from ..describe.cost import Costs, load_cluster
from ..describe.model import Partition, load_model
from ..describe.partition import read_partition
from ..describe.workload import load_workload
from ..planner.facade import Setting

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Command = Callable[..., Any]


class InputError(click.ClickException):
    """Bad input: one line on stderr, status 2."""

    exit_code = 2


def fail(message: str) -> NoReturn:
    """End the command with one line and status 2."""
    raise InputError(" ".join(message.split()))


class OutFile(click.Path):
    """A file to write, whose folder must be there: known before the work, not after it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(super().convert(value, param, ctx))  # type: ignore[arg-type]
        if not path.parent.is_dir():
            self.fail(f"{path}: there is no folder {path.parent}; make it, or name another file", param, ctx)
        return path


OUT_FILE = OutFile()


def said(error: ValueError | OSError) -> str:
    """What an error says, without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def one_line_errors(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Report bad input (any ValueError or OSError) on one line, with status 2. ``DIP_DEBUG=1`` shows the traceback."""

    @functools.wraps(function)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError) as error:
            if os.environ.get("DIP_DEBUG") == "1":
                raise
            fail(said(error))

    return wrapper


def json_option(function: Command) -> Command:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, and nothing else there.")(
        function
    )


def setting_options(function: Command) -> Command:
    """Model, cluster, workload and what overrides them."""
    options = [
        click.option("--model", required=True, help="Shipped name (vlm-s, t2v-l, ...) or YAML file."),
        click.option("--cluster", required=True, help="Shipped name (h100, h800, h20) or YAML file."),
        click.option("--workload", required=True, help="Shipped mix (vlm-mix, ...), mix YAML, or JSON-lines file."),
        click.option("--costs", type=click.Path(path_type=Path), help="Measured costs, from `dip profile`."),
        click.option("--tp", type=click.IntRange(min=1), help="Tensor-parallel size (default: the model's)."),
        click.option("--pp", type=click.IntRange(min=1), help="Pipeline-parallel size (default: the model's)."),
        click.option("--dp", type=click.IntRange(min=1), help="Data-parallel size (default: the model's)."),
        click.option("--iterations", type=click.IntRange(min=1), help="How many batches (default: the workload's)."),
        click.option("--microbatches", type=click.IntRange(min=1), help="Microbatches a batch."),
        click.option("--workload-seed", type=int, default=0, show_default=True, help="Seed of a synthetic mix."),
        click.option("--memory-gb", type=click.FloatRange(min=0, min_open=True), help="Limit a rank's memory (1e9 B)."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


SETTING_NAMES = (
    "model", "cluster", "workload", "costs", "tp", "pp", "dp", "iterations", "microbatches", "workload_seed",
    "memory_gb",
)  # fmt: skip


def setting_of(values: dict[str, Any], replicas: int = 1) -> Setting:
    """The setting that the options of :func:`setting_options` name; takes them out of ``values``. With ``replicas``
    every iteration has as many batches."""
    given = {name: values.pop(name) for name in SETTING_NAMES}
    model = load_model(given["model"]).with_parallel(tp=given["tp"], pp=given["pp"], dp=given["dp"])
    seed, few, many = given["workload_seed"], given["iterations"], given["iterations"]
    if replicas > 1:
        few, many = 8, (few or 1) * replicas
    batches, earlier = (
        load_workload(given["workload"], model, count, given["microbatches"], number)
        for number, count in ((seed, many), (seed + 1, few))
    )
    if len(batches) % replicas:
        fail(f"--replicas {replicas}: {given['workload']} has {len(batches)} batches, which is no multiple of it")
    return Setting(
        model,
        load_cluster(given["cluster"]),
        batches,
        Costs.load(given["costs"]) if given["costs"] else None,
        given["memory_gb"] * 1e9 if given["memory_gb"] else None,
        earlier,
    )


def partition_of(path: Path | None, setting: Setting) -> Partition | None:
    """The partition in a file, checked against the setting's model."""
    return read_partition(path, setting.model) if path is not None else None


def search_options(function: Command) -> Command:
    """What a search may spend."""
    options = [
        click.option("--budget", type=click.FloatRange(min=0), default=1.0, show_default=True,
                     help="Seconds of search an iteration."),
        click.option("--workers", type=click.IntRange(min=1), help="Search threads (default: half the cores)."),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of the search."),
        click.option("--partition", type=click.Path(path_type=Path),
                     help="Partition YAML from `dip partition` (default: search one)."),
        click.option("--partition-budget", type=click.FloatRange(min=0), default=20.0, show_default=True,
                     help="Seconds to search for a partition where none is given."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def worker_count(workers: int | None) -> int:
    """The given number, or half the cores."""
    return workers or max(1, (os.cpu_count() or 2) // 2)


def print_json(data: Any) -> None:
    """Print JSON on stdout."""
    click.echo(json.dumps(data, indent=1, allow_nan=False))


@contextmanager
def progress_bar(text: str, total: int | None, quiet: bool = False) -> Iterator[Callable[[str | None], None]]:
    """A progress bar on stderr, on a terminal only; call what it gives after each step, with a new text if need be."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)

        def advance(description: str | None = None) -> None:
            progress.update(task, advance=1, description=description or text)

        yield advance
