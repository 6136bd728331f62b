"""``dip profile``: measure this device, calibrate the cost model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..describe.cost import Costs, load_cluster
from ..describe.model import MultimodalModel, load_model
from .common import json_option, one_line_errors, print_json, progress_bar


@click.command()
@click.option("--model", required=True, help="Shipped name (vlm-s, t2v-l, ...) or YAML file.")
@click.option("--cluster", help="The published rates to compare with (default: h100 on a GPU, else cpu).")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Costs file (default: MODEL-costs.json).")
@click.option("--tp", type=click.IntRange(min=1), help="Tensor-parallel size (default: the model's).")
@click.option("--layers", is_flag=True, help="Also measure the model's own Megatron layers, whole (tp 1, LLaVA).")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Runs behind each median.")
@json_option
@one_line_errors
def profile(
    model: str, cluster: str | None, out: Path | None, tp: int | None, layers: bool, repeats: int, as_json: bool
) -> None:
    """Measure this device at the model's shapes and write a costs file for --costs and for dip-config's ``costs``."""
    import torch

    from ..profile.operators import profile_operators

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    described = load_model(model).with_parallel(tp=tp)
    rates = load_cluster(cluster or ("h100" if device.type == "cuda" else "cpu"))
    with progress_bar("measuring", None, as_json) as advance:
        costs = profile_operators(described, rates, device, repeats=repeats, progress=advance)
        if layers:
            measured = _measure_layers(described, device, repeats, advance)
            costs = Costs(costs.efficiency, measured.tables, device=costs.device)
    path = out or Path(f"{described.name}-costs.json")
    costs.save(path)
    summary = dict(costs.efficiency)
    if as_json:
        print_json({"device": costs.device, "efficiency": summary, "tables": len(costs.tables), "out": str(path)})
        return
    for name, curve in summary.items():
        click.echo(f"{name}: " + ", ".join(f"{efficiency:.2f} at {size:.1e}" for size, efficiency in curve))
    click.echo(f"{costs.device}: {len(costs.tables)} tables of layers; written to {path}")


def _measure_layers(model: MultimodalModel, device: Any, repeats: int, progress: Callable[[str], None]) -> Costs:
    """Tables of the model's parts. Raises ValueError for a model that has no Megatron layers here."""
    from ..megatron.cpu import install_cpu_platform

    install_cpu_platform()
    import torch

    from ..profile.stages import costs_of, profile_llava
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
    return costs_of([samples], str(device))
