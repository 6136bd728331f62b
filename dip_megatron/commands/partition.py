"""``dip partition``: choose B_i, K_i and layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from ..describe.model import MultimodalModel
from ..describe.partition import write_partition
from ..planner.partitioning import Placement, Placements, choose_partition, paper_partition
from .common import OUT_FILE, fail, json_option, one_line_errors, print_json, progress_bar, setting_of, setting_options


@click.command()
@setting_options
@click.option("--budget", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Seconds to search.")
@click.option("--trials", type=click.IntRange(min=1), help="At most so many partitions tried.")
@click.option("--paper", is_flag=True, help="The paper's rules instead of a search.")
@click.option("--place", multiple=True, metavar="MODULE=HOW", help="segmented: over all ranks (default); replicated: "
              "whole on every rank; either: what is predicted to be faster.")  # fmt: skip
@click.option("--out", "-o", type=OUT_FILE, help="Partition YAML (default: MODEL-partition.yaml).")
@json_option
@one_line_errors
def partition(
    budget: float, trials: int | None, paper: bool, place: tuple[str, ...], out: Path | None, as_json: bool,
    **values: Any,
) -> None:  # fmt: skip
    """Choose sub-microbatch sizes B_i, segments K_i and layers to chunks; write a partition YAML and say why."""
    setting = setting_of(values)
    placements = _placements(place, setting.model)
    if paper:
        chosen = paper_partition(setting.model, setting.cluster, setting.batches, costs=setting.costs)
    else:
        with progress_bar("trying partitions", None, as_json) as advance:
            chosen = choose_partition(
                setting.model, setting.cluster, setting.batches, costs=setting.costs,
                memory_limit=setting.memory_limit, budget_seconds=budget, max_trials=trials,
                on_trial=lambda text, seconds: advance(f"{text}: {seconds:.3f} s"), placements=placements,
            )  # fmt: skip
    path = out or Path(f"{setting.model.name}-partition.yaml")
    write_partition(path, chosen)
    if as_json:
        modules = {
            m.module: {"unit_size": m.unit_size, "layers": m.layers, "replicated": m.replicated} for m in chosen.modules
        }
        print_json({"modules": modules, "reasons": chosen.reasons, "out": str(path)})
        return
    for module in chosen.modules:
        size = "whole microbatches" if module.unit_size is None else f"{module.unit_size} at a time"
        if module.replicated:
            click.echo(f"{module.module}: {size}, all {module.total} layers on every rank")
            continue
        click.echo(f"{module.module}: {size}, {module.segments} segment{'s' * (module.segments > 1)}")
        for k, row in enumerate(module.layers):
            click.echo(f"  segment {k}: layers per rank {' '.join(map(str, row))}")
    for reason in chosen.reasons:
        click.echo(reason)
    click.echo(f"written to {path}")


def _placements(given: tuple[str, ...], model: MultimodalModel) -> Placements:
    """Of ``--place``. Leaves with a message for what can't be."""
    placements: dict[str, Any] = {}
    encoders = [m.name for m in model.modules[:-1] if not m.upstream]
    for text in given:
        name, _, how = text.partition("=")
        if name not in encoders or how not in get_args(Placement):
            fail(f"--place {text}: must be MODULE=HOW with one of {', '.join(encoders) or 'no modules'} and "
                 f"{', '.join(get_args(Placement))}")  # fmt: skip
        placements[name] = how
    return placements
