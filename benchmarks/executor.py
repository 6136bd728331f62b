"""scripts/bench executor: DIP's executor against Megatron's own schedules, on two CPU processes or GPUs.

On a uniform text-only GPT, where DIP can gain nothing: the same order of the same stages as Megatron's interleaved
schedule; what the executor costs shows. With few microbatches: the backward in two against Megatron's 1F1B; whether it
gains what the simulator predicts from stage costs measured in the same run. What the hook costs a call of Megatron's
``get_forward_backward_func`` where DIP is off. Both sides run in turns in the same
processes on equal weights, and must agree on losses and gradients; a ratio is the median over pairs of iterations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.shared.ranks import run_ranks, worker_command
from dip_megatron.report.schedules import text_table

ROOT = Path(__file__).resolve().parents[1]
OVERHEAD, PREDICTION = 1.01, 0.05


@click.command()
@click.option("--quick", is_flag=True, help="A small model, few pairs: a check of the benchmark, no measurement.")
@click.option("--hidden", type=click.IntRange(min=64), default=384, show_default=True)
@click.option("--tokens", type=click.IntRange(min=16), default=256, show_default=True, help="Of a microbatch.")
@click.option("--layers", type=click.IntRange(min=4), default=8, show_default=True, help="In all; a multiple of 4.")
@click.option("--microbatches", type=click.IntRange(min=2), default=8, show_default=True, help="An even number.")
@click.option("--bubble-microbatches", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--rounds", type=click.IntRange(min=2), default=20, show_default=True, help="Pairs of iterations.")
@click.option("--cases", default="interleaved,split,hook", show_default=True, help="Comma-separated.")
@click.option("--limit", type=float, default=900.0, show_default=True, help="Seconds after which all is stopped.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write all numbers to this file, too.")
def main(
    quick: bool, hidden: int, tokens: int, layers: int, microbatches: int, bubble_microbatches: int, rounds: int,
    cases: str, limit: float, seed: int, path: Path | None,
) -> None:  # fmt: skip
    """Measure the executor against Megatron's own schedules."""
    if layers % 4 or microbatches % 2:
        raise click.UsageError("--layers must be a multiple of 4 and --microbatches even: two ranks of two chunks each")
    if quick:
        hidden, tokens, layers, rounds = 128, 64, 4, min(rounds, 4)
    setting = {
        "hidden": hidden, "tokens": tokens, "vocabulary": 1024, "layers": layers, "segments": 2,
        "microbatches": microbatches, "bubble_microbatches": bubble_microbatches, "rounds": rounds, "seed": seed,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        names = [name for name in cases.split(",") if name != "hook"]
        given = {"setting": setting, "seed": seed, "own_gpu": True, "cases": names, "out": str(out / "results.json")}
        (out / "setting.json").write_text(json.dumps(given))
        results: dict[str, Any] = {}
        if names:
            if run_ranks(worker_command("benchmarks.shared.executor_cases", out / "setting.json"), 2, out, limit):
                sys.exit(1)
            results = json.loads((out / "results.json").read_text())
        if "hook" in cases.split(","):
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.shared.hook_call"], capture_output=True, text=True, check=True,
                timeout=limit, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            results["hook"] = json.loads(done.stdout.splitlines()[-1])
    record = {"setting": setting, "load_average": os.getloadavg(), "results": results}
    if path is not None:
        path.write_text(json.dumps(record, indent=1))
    for line in _table(results):
        click.echo(line)
    if "interleaved" in results:
        low, middle, high = (1e6 * gap for gap in results["interleaved"]["gaps"])
        click.echo(f"between two operations: {middle:.0f} microseconds (middle half {low:.0f} .. {high:.0f})")
    click.echo(f"load average {', '.join(f'{x:.1f}' for x in os.getloadavg())} on {os.cpu_count()} cores")


def _table(results: dict[str, Any]) -> list[str]:
    rows = []
    if "interleaved" in results:
        r = results["interleaved"]
        met = r["ratio"] <= OVERHEAD
        rows.append(["executor, interleaved order", *_numbers(r), "", f"<= {OVERHEAD}", _met(met)])
    if "split" in results:
        r = results["split"]
        met = abs(r["ratio"] / r["predicted"] - 1) <= PREDICTION
        rows.append(["split backward, against 1F1B", *_numbers(r), f"{r['predicted']:.4f}",
                     f"predicted +- {PREDICTION:.0%}", _met(met)])  # fmt: skip
    if "hook" in results:
        r = results["hook"]
        rows.append(["a call of get_forward_backward_func, DIP off", f"{1e-3 * r['ours']:.6f}",
                     f"{1e-3 * r['theirs']:.6f}", f"+{r['ours'] - r['theirs']:.2f} us", "", "", "", ""])  # fmt: skip
    head = ["case", "DIP ms", "Megatron ms", "ratio", "middle half of pairs", "predicted", "bar", ""]
    return text_table(head, rows).splitlines()


def _numbers(result: dict[str, Any]) -> list[str]:
    ratios = sorted(result["ratios"])
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return [f"{1e3 * result['ours']:.1f}", f"{1e3 * result['theirs']:.1f}", f"{result['ratio']:.4f}",
            f"{low:.3f} .. {high:.3f}"]  # fmt: skip


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    main()
