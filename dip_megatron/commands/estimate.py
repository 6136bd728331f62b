"""``dip estimate``: what a script would gain, without training it."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..describe.cost import Costs, load_cluster
from ..describe.model import ModelError
from ..describe.workload import Microbatch, load_workload
from ..planner import estimate as estimating
from ..report.schedules import text_table
from ..report.tables import seconds
from ..schedulers.entry import Effort
from .common import InputError, one_line_errors, print_json, progress_bar, worker_count
from .sampling import on_the_host, replica_size, sampled

if TYPE_CHECKING:  # Megatron's own parts load once the world is pretended
    from ..megatron.sampling import Sample

MOST_REPLICAS = 8
NAMES = {
    "today": "as the script is",
    "megatron": "Megatron, best split",
    "dip": "DIP",
    "balanced": "DIP, --dip-balance swap",
}


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("--cluster", default="h100", show_default=True, help="Shipped name (h100, h200, ...) or YAML file.")
@click.option(
    "--gpus", type=click.IntRange(min=1), help="GPUs of the job (default: one replica of the script's sizes)."
)
@click.option("--workload", help="Take this mix instead of the script's data: a shipped name, mix YAML, or JSON lines.")
@click.option("--costs", type=click.Path(path_type=Path), help="Measured costs, from `dip profile`.")
@click.option("--iterations", type=click.IntRange(min=1), default=2, show_default=True, help="To judge by.")
@click.option(
    "--budget", type=click.FloatRange(min=0), default=0.5, show_default=True, help="Seconds of search a plan."
)
@click.option(
    "--rest", type=click.FloatRange(min=0), default=0.0, show_default=True,
    help="Seconds of an iteration outside of its schedule (optimizer, reductions, logs), to count in the gain.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), help="Search threads (default: half the cores).")
@click.option(
    "--recipe", is_flag=True, help="SCRIPT is a recipe of Megatron-Bridge's instead, as `dip doctor` takes it."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout at the end, and nothing else there.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@one_line_errors
def estimate(
    cluster: str, gpus: int | None, workload: str | None, costs: Path | None, iterations: int, budget: float,
    rest: float, workers: int | None, recipe: bool, as_json: bool, script: str, arguments: tuple[str, ...],
) -> None:  # fmt: skip
    """What an iteration of SCRIPT ARGUMENTS... takes today and would take under DIP. Simulated, on one process.

    The script runs as it is, without a GPU, up to its first iteration: the model is described, not built, and
    microbatches are read from its own data (or drawn from --workload). Partitions are chosen on a batch of which none
    is judged. Give the options of this command before SCRIPT, the script's own after it.

    With --recipe SCRIPT is a function that returns a configuration of Megatron-Bridge's, as FILE.py:FUNCTION,
    MODULE:FUNCTION or the name of one of Bridge's own, and ARGUMENTS are changes such as model.num_layers=4. Its data
    are drawn from --workload, or from the published mix nearest to them.
    """
    size = gpus or (0 if recipe else replica_size(arguments))
    if not recipe and not Path(script).is_file():
        raise InputError(f"{script}: no such script (a recipe of Megatron-Bridge's: give --recipe before it)")
    name = script if recipe else Path(script).name
    rates, measured = load_cluster(cluster), Costs.load(costs) if costs else None

    terminal = sys.stderr  # the script's own words are kept back

    def described(sample: Sample) -> None:
        click.echo(_first_words(sample, size), file=terminal)
        if workload is not None:
            from ..megatron.sampling import SampleTaken

            raise SampleTaken(sample)

    with progress_bar(f"reading {name}", None, as_json) as advance:
        if recipe:
            sample, size = _recipe(script, arguments, size)
            workload = workload or sample.workload
            click.echo(_first_words(sample, size), file=terminal)
        else:
            sample = sampled(
                Path(script), arguments, size,
                lambda each, replicas: each * min(replicas, MOST_REPLICAS) * (iterations + 1),
                described=described, progress=lambda: advance(None),
            )  # fmt: skip
        mix = load_workload(workload or sample.workload, sample.model, 2, sample.each, 0)
        unseen = [batch.microbatches for batch in mix]
        known, judged = _batches(sample, workload, min(sample.replicas, MOST_REPLICAS), iterations)
        today: Any
        try:
            layers = None if sample.layout is None else sample.layout.layers
            today = estimating.todays_choice(sample.model, sample.each, layers)
        except ModelError as error:
            today = str(error)
        found = estimating.estimate(
            sample.model, rates, measured, known, judged, today,
            Effort(budget, worker_count(workers)), rest=rest, progress=lambda what: advance(what), unseen=unseen,
        )  # fmt: skip
    if as_json:
        print_json({"cluster": cluster, "gpus": size, "estimate": _as_dict(found)})
    else:
        click.echo(_told(found, sample, cluster, name, workload, costs))
        click.echo(_how_to_train(script, sample.replicas > 1, recipe))


def _recipe(recipe: str, overrides: tuple[str, ...], gpus: int) -> tuple[Sample, int]:
    """What a recipe of Bridge's asks for, on how many GPUs (``gpus`` 0: one replica). Raises InputError."""
    from ..compat.lone_rank import pretend_world
    from ..doctor.recipes import RecipeError, bridge_configuration

    on_the_host()
    said = io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                config = bridge_configuration(recipe, overrides)
                from ..families.known import known_families
                from ..megatron.recipe_sample import replica_size, sample_of_recipe
            except (RecipeError, ImportError) as error:
                raise InputError(f"{recipe}: {error}") from error
            each = replica_size(config)
            size = gpus or each
            if size % each:
                raise InputError(f"--gpus {gpus}: no multiple of the {each} of one replica")
            pretend_world(size)
            try:
                return sample_of_recipe(config, known_families(), size), size
            except ValueError:
                raise
            except Exception as error:  # whatever a provider may need
                raise InputError(f"{recipe}: its model can't be made: {type(error).__name__}: {error}") from error
    finally:
        logging.disable(logging.NOTSET)


def _batches(
    sample: Sample, workload: str | None, replicas: int, iterations: int
) -> tuple[list[list[Microbatch]], list[list[list[Microbatch]]]]:
    """A batch of each replica to choose by, and ``iterations`` to judge by; of fewer replicas if data is short."""
    microbatches = list(sample.microbatches)
    if workload is not None:
        drawn = load_workload(workload, sample.model, replicas * (iterations + 1), sample.each, 0)
        microbatches = [m for batch in drawn for m in batch.microbatches]
    whole = sample.each * (iterations + 1)  # of one replica
    replicas = min(replicas, len(microbatches) // whole)
    if replicas == 0:
        raise InputError(
            f"the script's data gave {len(microbatches)} microbatches, an estimate needs {whole} ({sample.trouble}); "
            "lower --iterations, or name a --workload"
        )
    lots = [microbatches[i : i + sample.each] for i in range(0, whole * replicas, sample.each)]
    return lots[:replicas], [lots[i : i + replicas] for i in range(replicas, len(lots), replicas)]


def _first_words(sample: Sample, size: int) -> str:
    model = sample.model
    parts = ", ".join(f"{m.name} {m.layers} layers ({m.parameters / 1e9:.3g}B)" for m in model.modules)
    parallel = model.parallel
    return (
        f"{parts}; TP {parallel.tp} x PP {parallel.pp} x DP {parallel.dp} on {size} GPUs, "
        f"{sample.each} microbatches a replica and iteration"
    )


def _as_dict(found: estimating.Estimate) -> dict[str, Any]:
    data = asdict(found)
    del data["partition"]
    return data


def _told(
    found: estimating.Estimate, sample: Sample, cluster: str, name: str, workload: str | None, costs: Path | None
) -> str:  # fmt: skip
    rows = []
    for key, title in NAMES.items():
        if key in found.outcomes:
            o = found.outcomes[key]
            rows.append([
                title, seconds(o.job_seconds), seconds(o.seconds), f"{o.straggling:.3f}", f"{o.bubble_ratio:.1%}",
                f"{o.peak_bytes / 1e9:.1f}" + ("" if o.fits else " !"), f"{o.recompute:.1%}",
            ])  # fmt: skip
    header = ["", "iteration", "mean replica", "slowest/mean", "bubbles", "peak GB", "recompute"]
    data = workload or f"{name}'s data"
    text = [
        f"Simulated for {cluster}: {found.iterations} iterations of {found.replicas} replica"
        f"{'s' * (found.replicas > 1)}, {data}.",
        text_table(header, rows),
    ]
    text += [f"{NAMES[key]}: {o.layout}" for key, o in found.outcomes.items() if key != "balanced"]
    text += [f"{NAMES[key]}: can't run: {reason}" for key, reason in found.refused.items()]
    if any(not o.fits for o in found.outcomes.values()):
        text.append("!: does not fit even with the leanest recompute")
    if found.gain is not None and found.gain_between is not None and found.gain_of_batches is not None:
        (low, high), (few, many) = found.gain_between, found.gain_of_batches
        text.append(
            f"Today's iteration takes {found.gain:.2f}x DIP's; half of the iterations {few:.2f}x to {many:.2f}x; "
            f"{low:.2f}x to {high:.2f}x where the encoders' prices are off by 20%. What follows an iteration "
            "(optimizer, reductions, logs) takes both the same time, and "
            + (f"is in it with {seconds(found.rest)}." if found.rest else "isn't in it: give it as --rest.")
        )
    dip = found.outcomes["dip"]
    over = (dip.seconds - dip.planning) / dip.bound
    text.append(f"DIP's plans are within {over - 1:.1%} of a proven bound.")
    if dip.planning:
        text.append(f"Ranks and planning share cores here: {seconds(dip.planning)} of DIP's iteration are planning.")
    if costs is None:
        text.append("Prices are modelled. Measured ones: `dip profile SCRIPT ...` on one such device, then --costs.")
    text.append(f"Planning needs two cores of each replica's hosts ({sample.replicas} replicas).")
    return "\n".join(text)


def _how_to_train(script: str, replicas: bool, recipe: bool) -> str:
    """The lines to add."""
    if recipe:
        settings = '"schedule": "dynamic"' + (', "balance": "swap"' * replicas)
        return "\n".join([
            "", "To train so, put into the script, before Megatron is used,",
            "    import dip_megatron", "    dip_megatron.install()",
            "and into the configuration that the recipe returns", f"    config.dip = {{{settings}}}",
        ])  # fmt: skip
    flags = "--dip-schedule dynamic" + (" --dip-balance swap" * replicas)
    return "\n".join([
        "", "To train so, launch as before, with",
        f"    python -m dip_megatron.cli run {script} ... {flags}",
        "in place of the script, or put into it, before Megatron is used,",
        "    import dip_megatron",
        "    dip_megatron.install()",
        f"and add {flags} to its flags.",
    ])  # fmt: skip
