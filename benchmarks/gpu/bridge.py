"""Qwen2.5-VL through Megatron-Bridge's own loop on ranks that share one GPU, with DIP and without.

    python -m benchmarks.gpu.bridge [--ranks 4] [--iterations 8] [--out FOLDER]

A tiny model with Transformer Engine's own layers: what is looked at is whether it trains, and whether losses and
gradient norms are the same. Without a GPU it runs on CPU processes with the tests' stand-in for Transformer Engine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from benchmarks.shared.ranks import has_gpu, run_as_rank, run_ranks

from .mps import MpsError, divided_gpu

FAMILY = "qwen2-5-vl"


def train(folder: Path, dip: bool, iterations: int) -> None:
    """One training on this rank, as Bridge has it; what it measured goes to a file."""
    import torch

    if not torch.cuda.is_available():
        import tests.bridge.preloaded  # noqa: F401  the stand-in, and Megatron on CPU ranks
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.vlm_step import forward_step

    import dip_megatron
    from dip_megatron.megatron.shared_gpu import single_ranks_on_nccl
    from tests.bridge.loop import Run, configuration

    single_ranks_on_nccl(SimpleNamespace(distributed_backend="gloo"))
    dip_megatron.install()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found: dict[str, list[float]] = {"ends": [], "losses": [], "norms": []}

    class Record(Callback):
        def on_train_step_end(self, context: Any) -> None:
            found["ends"].append(time.perf_counter())
            found["norms"].append(float(context.grad_norm))
            if context.loss_dict:
                found["losses"].append(float(context.loss_dict["lm loss"]))

    settings = {"schedule": "dynamic", "search_budget": 0.1} if dip else None
    run = Run(pipeline=ranks, iterations=iterations, dip=settings, bf16=torch.cuda.is_available(), tiny=FAMILY)
    pretrain(configuration(folder, run), forward_step, callbacks=[Record()])
    (folder / f"{'dip' if dip else 'off'}-{rank}.json").write_text(json.dumps(found))


def differences(out: Path, ranks: int) -> dict[str, Any]:
    """Both trainings, side by side."""
    off, dip = (json.loads((out / f"{name}-{ranks - 1}.json").read_text()) for name in ("off", "dip"))

    def worst(name: str) -> float:
        return max(abs(a - b) / abs(a) for a, b in zip(off[name], dip[name], strict=True))

    line = {"name": "dip", "loss_difference": worst("losses"), "norm_difference": worst("norms")}
    return {"summary": [line], "off": off, "dip": dip}


@click.command()
@click.option("--ranks", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--iterations", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--percent", type=float, default=12.0, show_default=True, help="Share of the GPU's SMs per rank.")
@click.option("--card-gb", type=float, default=18.5, show_default=True, help="A rank's memory limit.")
@click.option("--limit", type=float, default=220.0, show_default=True, help="Seconds for each training.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/gpu_bridge"), show_default=True)
@click.option("--rank-of", type=click.Choice(["off", "dip"]), hidden=True)
def main(ranks: int, iterations: int, percent: float, card_gb: float, limit: float, out: Path, rank_of: str) -> None:
    """Train Qwen2.5-VL in Bridge's loop twice."""
    if rank_of:
        run_as_rank(lambda: train(out, rank_of == "dip", iterations))
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    from tests.bridge.tiny import TINY

    TINY[FAMILY].save(out)
    gpu = has_gpu()
    for name in ("off", "dip"):
        with ExitStack() as stack:
            try:
                shared = stack.enter_context(divided_gpu(percent, card_gb)) if gpu else {}
            except MpsError as error:
                raise click.ClickException(str(error)) from error
            command = [
                sys.executable,
                "-m",
                "benchmarks.gpu.bridge",
                "--iterations",
                str(iterations),
                "--out",
                str(out),
            ]
            if run_ranks([*command, "--rank-of", name], ranks, out, limit, shared):
                raise click.ClickException(f"the training with DIP {name} failed; see {out}")
    record = differences(out, ranks)
    (out / "results.json").write_text(json.dumps(record, indent=1))
    (line,) = record["summary"]
    click.echo(f"losses differ by {line['loss_difference']:.1e}, gradient norms by {line['norm_difference']:.1e}")
    most = 1e-2 if gpu else 1e-4  # bf16 sums in another order
    if max(line["loss_difference"], line["norm_difference"]) > most:
        raise click.ClickException(f"more than {most:g}: they don't train the same model")


if __name__ == "__main__":
    main()
