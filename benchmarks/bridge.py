"""scripts/bench bridge: Megatron-Bridge's own loop under DIP, against the same loop under its interleaved schedule.

A uniform GPT in two virtual stages on two ranks, where DIP can gain nothing: what it costs in a real loop, with
reading, planning, gradients and optimizer. Trainings of both kinds run in turns, in processes of their own, from equal
weights on equal batches, and must agree on losses and gradient norms. A ratio is that of two neighbouring trainings'
median iterations. Needs the environment with Megatron-Bridge (``scripts/test`` builds it); on CPU ranks, with the
tests' stand-in for Transformer Engine.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BRIDGE = ROOT / ".venv-bridge" / "bin" / "python"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))

import click  # noqa: E402

RANKS, BAR, SETTLED = 2, 1.03, 3  # iterations before the times of a training are looked at


def train(rank: int, world: int, folder: Path, dip: bool, iterations: int, microbatches: int) -> dict[str, list[float]]:
    """One training on this rank: when its steps ended, losses (on the last rank) and gradient norms."""
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)  # Bridge says a lot
    os.dup2(log, 2)
    from megatron.bridge.training import gpt_step
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.pretrain import pretrain

    import dip_megatron
    from tests.bridge.loop import Run, configuration

    dip_megatron.install()
    result: dict[str, list[float]] = {"ends": [], "losses": [], "norms": []}

    class Record(Callback):
        def on_train_step_end(self, context: Any) -> None:
            result["ends"].append(time.perf_counter())
            result["norms"].append(float(context.grad_norm))
            if context.loss_dict:
                result["losses"].append(float(context.loss_dict["lm loss"]))

    settings = {"schedule": "dynamic"} if dip else None
    run = Run(text=True, pipeline=world, virtual=2, iterations=iterations, micro_batch_size=2, dip=settings)
    config = configuration(folder, run)
    config.train.global_batch_size = 2 * microbatches
    pretrain(config, gpt_step.forward_step, callbacks=[Record()])
    return result


def save_model(folder: Path, hidden: int, layers: int) -> None:
    """A Qwen2 of equal layers, with a vocabulary so small that its ends weigh little."""
    import torch
    import transformers

    from tests.bridge.tiny_model import VOCABULARY

    torch.manual_seed(7)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=512,
        tie_word_embeddings=False, dtype=torch.float32, architectures=["Qwen2ForCausalLM"],
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).float().save_pretrained(folder)


def measured(folder: Path, dip: bool, iterations: int, microbatches: int) -> tuple[float, list[float]]:
    """Median seconds of an iteration, and what both kinds must agree on."""
    from benchmarks.bridge import train  # by a name that ranks can import
    from tests.processes import Team

    team = Team(RANKS)  # Bridge initializes a process once
    try:
        ranks = team.run(train, folder, dip, iterations, microbatches)
    finally:
        team.close()
    ends = ranks[-1]["ends"]
    steps = [b - a for a, b in itertools.pairwise(ends)][SETTLED:]
    return statistics.median(steps), [*ranks[-1]["losses"], *ranks[-1]["norms"]]


@click.command()
@click.option("--hidden", type=click.IntRange(min=64), default=256, show_default=True, help="A multiple of 64.")
@click.option("--layers", type=click.IntRange(min=4), default=8, show_default=True, help="In all; a multiple of 4.")
@click.option("--microbatches", type=click.IntRange(min=2), default=8, show_default=True, help="An even number.")
@click.option("--iterations", type=click.IntRange(min=6), default=14, show_default=True, help="Of a training.")
@click.option("--pairs", type=click.IntRange(min=1), default=4, show_default=True, help="Of trainings.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write all numbers to this file, too.")
def main(hidden: int, layers: int, microbatches: int, iterations: int, pairs: int, path: Path | None) -> None:
    """Measure Bridge's loop under DIP against its own interleaved schedule."""
    from tests import forked

    forked.preload("tests.bridge.preloaded")
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, hidden, layers)
        for pair in range(pairs):
            seconds: dict[bool, float] = {}
            numbers: dict[bool, list[float]] = {}
            for dip in (True, False) if pair % 2 else (False, True):
                seconds[dip], numbers[dip] = measured(folder, dip, iterations, microbatches)
            worst = max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(numbers[True], numbers[False], strict=True))
            if worst > 1e-4:
                raise click.ClickException(f"both trainings differ by {worst:.1e}: they don't train the same model")
            found.append((seconds[True], seconds[False]))
            ratio = seconds[True] / seconds[False]
            click.echo(f"DIP {1e3 * seconds[True]:.1f} ms, Bridge's own {1e3 * seconds[False]:.1f} ms: {ratio:.4f}")
    ratio = statistics.median(a / b for a, b in found)
    click.echo(f"median {ratio:.4f}, bar <= {BAR}: {'met' if ratio <= BAR else 'MISSED'}")
    click.echo(f"load average {', '.join(f'{x:.1f}' for x in os.getloadavg())} on {os.cpu_count()} cores")
    if path is not None:
        path.write_text(json.dumps({"pairs": found, "ratio": ratio, "load_average": os.getloadavg()}, indent=1))


if __name__ == "__main__":
    if "PYTHON" not in os.environ and BRIDGE.is_file() and Path(sys.prefix) != BRIDGE.parents[1]:
        os.execv(BRIDGE, [str(BRIDGE), *sys.argv])
    main()
