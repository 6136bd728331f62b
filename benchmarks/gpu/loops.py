"""Megatron's own training loop under several schedules, on ranks that share one GPU.

    python -m benchmarks.gpu.loops CASE [--schedules off,dynamic] [--size full|tiny] [--out FOLDER]

What ``scripts/bench gpu`` does for synthetic batches under the executor alone, with everything that a run has: data
loader, read-ahead, planner, gradients, optimizer. Each schedule trains from the same weights on the same batches, in
processes of its own; the table has their iterations, and ``results.json`` all numbers. Without a GPU ``tiny`` runs on
CPU processes: a check, no measurement.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.shared.ranks import has_gpu, run_ranks
from dip_megatron.schedulers.registry import find_schedule

from .mps import MpsError, divided_gpu

WARM = 3
"""Iterations before times count: the first plans are made without measured costs, and kernels are loaded."""
_ON_ONE_GPU = (
    "--distributed-backend gloo --transformer-impl local --attention-backend unfused --no-masked-softmax-fusion "
    "--no-bias-gelu-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion --no-persist-layer-norm "
    "--no-rope-fusion"
)
_TRAINING = (
    "--micro-batch-size 1 --lr 1e-4 --lr-warmup-iters 1 --lr-decay-style constant --weight-decay 0 --clip-grad 1.0 "
    "--hidden-dropout 0 --attention-dropout 0 --seed 1234 --log-interval 1 --eval-interval 100000 --eval-iters 1 "
    "--num-workers 0 --position-embedding-type rope"
)
_LAYERS = {"language": "--num-layers", "diffusion": "--dit-num-layers"}
_LINE = r"iteration +(\d+)/ *\d+ .*elapsed time per iteration \(ms\): ([\d.]+).* {loss}: ([\d.E+-]+)"


@dataclass(frozen=True)
class Case:
    """A script and its flags: of any size, then of a ``full`` and a ``tiny`` model. ``loss`` is its name in the log;
    ``launch`` starts it so that weights don't depend on the partition."""

    what: str
    script: str
    full: str
    tiny: str
    loss: str = "lm loss"
    flags: str = ""
    launch: str = "-m dip_megatron.cli run"
    first: str = "off"
    segments: str = ""
    """partition of the schedules over segments, in YAML (empty: DIP chooses), of a layer or more for each of ranks"""


_EXPERTS = (
    "--num-experts 8 --moe-router-topk 2 --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 1e-2 "
    "--disable-bias-linear --untie-embeddings-and-output-weights --tokenizer-type NullTokenizer --mock-data "
    "--split 100,0,0"
)
CASES = {
    "llava": Case(
        "a LLaVA on packed documents", "examples/llava_digits/pretrain_llava_digits.py",
        "--num-layers 16 --hidden-size 2048 --num-attention-heads 16 --vision-num-layers 24 --vision-hidden-size 1152 "
        "--image-side 24 --patch-side 2 --seq-length 1024 --max-position-embeddings 1024 --global-batch-size 16 --bf16",
        "--num-layers 4 --hidden-size 96 --num-attention-heads 4 --vision-num-layers 4 --vision-hidden-size 96 "
        "--image-side 24 --patch-side 8 --seq-length 192 --max-position-embeddings 192 --global-batch-size 4",
        flags="--rotary-base 20 --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 32 "
        "--calculate-per-token-loss --weights-by-name",
    ),
    "t2v": Case(
        "text to video", "scripts/pretrain_t2v.py",
        "--num-layers 8 --hidden-size 1024 --num-attention-heads 16 --dit-num-layers 24 --dit-hidden-size 1536 "
        "--dit-num-attention-heads 16 --dit-ffn-hidden-size 6144 --seq-length 64 --max-position-embeddings 64 "
        "--global-batch-size 16 --bf16",
        "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --dit-num-layers 4 --dit-hidden-size 96 "
        "--dit-num-attention-heads 4 --dit-ffn-hidden-size 256 --seq-length 64 --max-position-embeddings 64 "
        "--global-batch-size 4",
        loss="flow loss", flags="--make-vocab-size-divisible-by 32 --calculate-per-token-loss", first="megatron-1f1b",
        # Chunks are chosen by a published mix of clips, which these are far too small for.
        segments="modules: {{language: {{layers: [{language}]}}, diffusion: {{layers: [{diffusion}], unit_size: 4}}}}",
    ),
    "experts": Case(
        "a mixture of experts", "tests/upstream/pretrain_tiny_gpt.py",
        "--num-layers 16 --hidden-size 1024 --num-attention-heads 16 --ffn-hidden-size 2816 --seq-length 2048 "
        "--max-position-embeddings 2048 --vocab-size 32000 --global-batch-size 16 --bf16",
        "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --seq-length 64 "
        "--max-position-embeddings 64 --vocab-size 127 --global-batch-size 4",
        flags=_EXPERTS, launch="tests/upstream/launch.py run",
    ),
}  # fmt: skip


@dataclass
class Trained:
    """What one training wrote: seconds, losses, and DIP's own lines, by iteration."""

    schedule: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    planned: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""

    def line(self, reference: Trained) -> dict[str, Any]:
        """Medians after the first iterations, and over the reference's batch by batch."""
        times = self.seconds[WARM:]
        pairs = list(zip(reference.seconds[WARM:], times, strict=False))
        plans = self.planned[WARM:]
        return {
            "schedule": self.schedule,
            "failure": self.failure,
            "seconds": statistics.median(times) if times else None,
            "spread": statistics.pstdev(times) / statistics.mean(times) if times else None,
            "gain": statistics.median(a / b for a, b in pairs) if pairs else None,
            "measured_over_predicted": _median(p["iteration_seconds"] / p["predicted_seconds"] for p in plans),
            "bubble": _median(p["bubble_ratio_measured"] for p in plans),
            "bubble_planned": _median(p["bubble_ratio_planned"] for p in plans),
            "waited": _median(p["stall_seconds"] for p in plans),
            "loss_difference": max(
                (abs(a - b) / abs(a) for a, b in zip(reference.losses, self.losses, strict=False)), default=None
            ),
        }


def _median(values: Any) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def command_of(case: Case, size: str, iterations: int, ranks: int, *dip: str) -> list[str]:
    """What every rank runs."""
    return [
        sys.executable, *case.launch.split(), case.script, *_TRAINING.split(), *_ON_ONE_GPU.split(),
        *([] if has_gpu() else ["--use-cpu-initialization"]), *case.flags.split(), *getattr(case, size).split(),
        "--train-iters", str(iterations), "--pipeline-model-parallel-size", str(ranks), *dip,
    ]  # fmt: skip


def trained(
    case: Case, size: str, schedule: str, iterations: int, ranks: int, out: Path, limit: float, shared: dict[str, str],
) -> Trained:  # fmt: skip
    """Train under one schedule and read what it wrote. A run that fails says so in its ``failure``."""
    trace = out / "trace"
    out.mkdir(parents=True, exist_ok=True)
    dip = [] if schedule == "off" else ["--dip-schedule", schedule, "--dip-trace-dir", str(trace)]
    if size == "tiny" and schedule != "off":
        dip += ["--dip-search-budget", "0.05"]
    if case.segments and find_schedule(schedule).mixed is None:
        flags = getattr(case, size).split()
        layers = {name: int(flags[flags.index(flag) + 1]) // ranks for name, flag in _LAYERS.items()}
        config = out / "dip.yaml"
        config.write_text(case.segments.format(**{name: [n] * ranks for name, n in layers.items()}) + "\n")
        dip += ["--dip-config", str(config)]
    failed = run_ranks(command_of(case, size, iterations, ranks, *dip), ranks, out, limit, shared)
    result = Trained(schedule)
    line = re.compile(_LINE.format(loss=re.escape(case.loss)))
    for _, milliseconds, loss in line.findall((out / f"rank{ranks - 1}.log").read_text(errors="replace")):
        result.seconds.append(float(milliseconds) / 1e3)
        result.losses.append(float(loss))
    written = trace / "iterations.jsonl"
    if written.exists():
        result.planned = [json.loads(text) for text in written.read_text().splitlines()]
    if failed or len(result.seconds) < iterations:
        result.failure = f"{len(result.seconds)} of {iterations} iterations; see {out}"
    return result


def print_table(title: str, lines: Sequence[dict[str, Any]]) -> None:
    """Print what was found."""
    table = Table(title=title)
    for head in ("schedule", "s/iteration", "spread", "gain", "measured / predicted", "bubble (planned)", "waited",
                 "loss differs"):  # fmt: skip
        table.add_column(head, justify="left" if head == "schedule" else "right")

    def said(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for line in lines:
        bubble = "" if line["bubble"] is None else f"{line['bubble']:.1%} ({line['bubble_planned']:.1%})"
        table.add_row(
            line["schedule"], line["failure"] or said(line["seconds"], ".4f"), said(line["spread"], ".1%"),
            said(line["gain"], ".3f"), said(line["measured_over_predicted"], ".3f"), bubble,
            said(line["waited"], ".1e"), said(line["loss_difference"], ".0e"),
        )  # fmt: skip
    Console(width=150).print(table)


@click.command()
@click.argument("case", type=click.Choice(sorted(CASES)))
@click.option("--size", type=click.Choice(["auto", "full", "tiny"]), default="auto", show_default=True)
@click.option("--schedules", default="megatron-interleaved,dip-paper,dynamic", show_default=True,
              help="Comma-separated; after the loop's own or, where the model has none, 1F1B.")  # fmt: skip
@click.option("--iterations", type=click.IntRange(min=WARM + 1), default=15, show_default=True)
@click.option("--ranks", type=click.IntRange(min=2), default=4, show_default=True)
@click.option("--percent", type=float, default=12.0, show_default=True, help="Share of the GPU's SMs per rank.")
@click.option("--card-gb", type=float, default=18.5, show_default=True, help="A rank's memory limit.")
@click.option("--limit", type=float, default=120.0, show_default=True, help="Seconds for each training.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/gpu_loops"), show_default=True)
def main(
    case: str, size: str, schedules: str, iterations: int, ranks: int, percent: float, card_gb: float, limit: float,
    out: Path,
) -> None:  # fmt: skip
    """Train CASE under several schedules in Megatron's own loop."""
    gpu = has_gpu()
    size = ("full" if gpu else "tiny") if size == "auto" else size
    out = out.resolve() / case
    runs: list[Trained] = []
    for schedule in (CASES[case].first, *schedules.split(",")):
        with ExitStack() as stack:
            try:
                shared = stack.enter_context(divided_gpu(percent, card_gb)) if gpu else {}
            except MpsError as error:
                raise click.ClickException(str(error)) from error
            runs.append(trained(CASES[case], size, schedule, iterations, ranks, out / schedule, limit, shared))
        lines = [run.line(runs[0]) for run in runs]
        record = {"case": case, "size": size, "ranks": ranks, "summary": lines, "runs": [asdict(run) for run in runs]}
        (out / "results.json").write_text(json.dumps(record, indent=1))  # what has been measured is kept
    print_table(f"{CASES[case].what}, {size}, {ranks} ranks", lines)
    if any(run.failure for run in runs):
        sys.exit(1)


if __name__ == "__main__":
    main()
