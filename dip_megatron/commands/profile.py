"""``dip profile``: measure this device, calibrate the cost model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..describe.cost import Cluster, Costs, load_cluster
from ..describe.model import MultimodalModel, load_model
from ..report.tables import seconds
from .common import OUT_FILE, InputError, json_option, one_line_errors, print_json, progress_bar
from .sampling import replica_size, sampled

if TYPE_CHECKING:  # torch and Megatron load once they are needed
    import torch

    from ..megatron.sampling import Reading

READ = 32  # microbatches of the script's, of which some are measured


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--model", help="Shipped name (vlm-s, t2v-l, ...) or YAML file.")
@click.option("--cluster", help="The published rates to compare with (default: h100 on a GPU, else cpu).")
@click.option("--out", "-o", type=OUT_FILE, help="Costs file (default: MODEL-costs.json).")
@click.option("--tp", type=click.IntRange(min=1), help="Tensor-parallel size (default: the model's).")
@click.option("--layers", is_flag=True, help="Also measure the model's own Megatron layers, whole (tp 1, LLaVA).")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Runs behind each median.")
@json_option
@click.argument("script", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@one_line_errors
def profile(
    model: str | None, cluster: str | None, out: Path | None, tp: int | None, layers: bool, repeats: int,
    as_json: bool, script: str | None, arguments: tuple[str, ...],
) -> None:  # fmt: skip
    """Measure this device at a model's shapes and write a costs file for --costs and for dip-config's ``costs``.

    With SCRIPT ARGUMENTS... in place of --model the script's own model is measured, whole, on microbatches of its own
    data; the script runs as it is up to its first iteration. Ranks that compute on cores of this machine are measured
    while as many other cores as a replica has ranks are busy, too. Give the options of this command before SCRIPT.
    """
    import torch

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    rates = load_cluster(cluster or ("h100" if device.type == "cuda" else "cpu"))
    if script is not None:
        if model is not None or layers or tp is not None:
            raise InputError("--model, --tp and --layers are for a described model; a SCRIPT's is measured as it is")
        path = out or Path(f"{Path(script).stem}-costs.json")
        costs = _measure_script(Path(script), arguments, rates, device, repeats, as_json)
        costs.save(path)
        _tell(costs, path, as_json)
        return
    if model is None:
        raise InputError("what to measure? Give --model NAME, or a script with its flags")

    from ..profile.operators import profile_operators

    described = load_model(model).with_parallel(tp=tp)
    with progress_bar("measuring", None, as_json) as advance:
        costs = profile_operators(described, rates, device, repeats=repeats, progress=advance)
        if layers:
            measured = _measure_layers(described, device, repeats, advance)
            costs = Costs(costs.efficiency, measured.tables, device=costs.device)
    path = out or Path(f"{described.name}-costs.json")
    costs.save(path)
    _tell(costs, path, as_json)


def _tell(costs: Costs, path: Path, as_json: bool) -> None:
    """What was found, in short."""
    if as_json:
        summary = dict(costs.efficiency)
        print_json({"device": costs.device, "efficiency": summary, "tables": len(costs.tables), "out": str(path)})
        return
    for name, curve in costs.efficiency:
        click.echo(f"{name}: " + ", ".join(f"{efficiency:.2f} at {size:.1e}" for size, efficiency in curve))
    for table in costs.tables:
        if table.part == "layer" and table.strategy == "none" and table.quantity in ("forward", "backward", "weight"):
            points = ", ".join(f"{seconds(value)} at {tokens:.0f}" for tokens, value in zip(
                table.tokens, table.values, strict=True))  # fmt: skip
            click.echo(f"{table.module}, {table.quantity} of a layer: {points} tokens")
    click.echo(f"{costs.device}: {len(costs.tables)} tables of layers; written to {path}")


def _measure_script(
    script: Path, arguments: tuple[str, ...], rates: Cluster, device: torch.device, repeats: int, as_json: bool
) -> Costs:
    """Of the model and data of a script. Raises InputError for a script that can't be run or measured here."""
    for flag in ("--tensor-model-parallel-size", "--context-parallel-size"):
        if replica_size(arguments, (flag,)) > 1:
            raise InputError(f"{flag}: one process can't measure what several exchange; set it to 1, or use --model")
    size = replica_size(arguments)
    found: list[Costs] = []
    neighbours = 0 if device.type == "cuda" else min(size, len(os.sched_getaffinity(0))) - 1
    with progress_bar(f"measuring {script.name}", None, as_json) as advance:

        def measure(reading: Reading) -> None:
            from ..profile.script import profile_reading

            found.append(
                profile_reading(reading, rates, device, neighbours=neighbours, repeats=repeats, progress=advance)
            )

        sampled(
            script, arguments, size, lambda each, replicas: READ, hide_gpus=device.type != "cuda", then=measure,
            progress=lambda: advance(None),
        )  # fmt: skip
    return found[0]


def _measure_layers(model: MultimodalModel, device: Any, repeats: int, progress: Callable[[str], None]) -> Costs:
    """Tables of the model's parts. Raises ValueError for a model that has no Megatron layers here."""
    from ..megatron.cpu import install_cpu_platform
    from ..megatron.device import device_name

    install_cpu_platform()
    import torch

    from ..profile.operations import costs_of, profile_llava
    from ..testing.alone import process_alone
    from ..testing.synthetic import llava_arguments

    logging.getLogger("megatron").setLevel(logging.ERROR)
    alone = model.with_parallel(pp=1, dp=1)
    arguments = llava_arguments(alone, torch.bfloat16 if device.type == "cuda" else torch.float32)
    packing = model.packing
    with process_alone():
        samples = profile_llava(
            arguments, alone, device, repeats=repeats, progress=progress,
            images=sorted({min(n, packing.max_images) for n in (1, 2, 4, 8, 16)}),
            tokens=(packing.max_tokens // 4, packing.max_tokens // 2, packing.max_tokens),
        )  # fmt: skip
    return costs_of([samples], device_name())
