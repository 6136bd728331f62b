"""scripts/bench estimate: what ``dip estimate`` foretells of the quickstart, against what the quickstart then gains.

First ``dip profile`` measures the script's model on this machine, then the quickstart trains under Megatron's 1F1B and
under DIP (the layout of its interleaved run has stages without layers, which an estimate refuses), then ``dip
estimate`` simulates the same batches with the measured costs, with what of an iteration lies outside of its schedule as
the run has measured it. Compared is batch by batch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
os.environ["OMP_NUM_THREADS"] = "1"

import click  # noqa: E402
from rich.console import Console  # noqa: E402

from dip_megatron.report.schedules import text_table  # noqa: E402
from examples.llava_digits.comparison import DIP, WARM_UP, planner_lines  # noqa: E402
from examples.llava_digits.quickstart import ARGUMENTS, ONE_F_ONE_B, contenders, train_all  # noqa: E402
from examples.llava_digits.runs import SCRIPT, Run, training_flags  # noqa: E402

BAR = 0.05
LAYOUTS = {"Megatron 1F1B": ONE_F_ONE_B}


def dip(verb: str, *words: str) -> None:
    """Run a verb on the quickstart's script and flags; ``words`` are its options. Raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "dip_megatron.cli", verb, *words], check=True, stdout=subprocess.PIPE)


def estimated(layout: str, flags: Sequence[str], costs: Path, rest: float, iterations: int) -> dict[str, Any]:
    """What ``dip estimate`` says of a layout of Megatron's."""
    words = ["--cluster", "cpu", "--costs", str(costs), "--rest", str(rest), "--iterations", str(iterations), "--json"]
    command = [sys.executable, "-m", "dip_megatron.cli", "estimate", *words, str(SCRIPT), *flags]
    done = subprocess.run(
        [*command, "--pipeline-model-parallel-layout", layout], check=True, capture_output=True, text=True
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)["estimate"]
    return found


def compared(runs: dict[str, Run], name: str, found: dict[str, Any]) -> dict[str, float]:
    """Medians over the batches that were both simulated and trained on after the warm-up: gains, and measured over
    predicted seconds of Megatron's iterations and of DIP's. The first batch chose; the second is the first judged."""
    jobs = {key: found["outcomes"][key]["jobs"] for key in ("today", "dip")}
    batches = [i for i in runs[DIP].seconds if WARM_UP < i <= len(jobs["dip"]) + 1]
    theirs, ours = ([job + found["rest"] for job in jobs[key]] for key in ("today", "dip"))
    return {
        "measured_gain": statistics.median(runs[name].seconds[i] / runs[DIP].seconds[i] for i in batches),
        "predicted_gain": statistics.median(theirs[i - 2] / ours[i - 2] for i in batches),
        "megatron": statistics.median(runs[name].seconds[i] / theirs[i - 2] for i in batches),
        "dip": statistics.median(runs[DIP].seconds[i] / ours[i - 2] for i in batches),
    }


@click.command()
@click.option("--iterations", type=click.IntRange(min=WARM_UP + 5), default=40, show_default=True, help="Per run.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write all numbers to this file, too.")
def main(iterations: int, path: Path | None) -> None:
    """Estimate the quickstart's gain, and measure it."""
    console = Console()
    flags = training_flags(iterations, ARGUMENTS)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        costs, traces = folder / "costs.json", folder / "dip"
        traces.mkdir()
        dip("profile", "-o", str(costs), str(SCRIPT), *flags)
        chosen = [c for c in contenders(traces, None) if c.title in (*LAYOUTS, DIP)]
        runs = train_all(chosen, iterations, flags, folder, console)
        outside = [
            statistics.mean(rank["outside"] for rank in line["breakdown"]["measured"])
            for line in planner_lines(traces)
        ]  # fmt: skip
        rest = statistics.median(outside)
        rows = {
            name: compared(runs, name, estimated(layout, flags, costs, rest, iterations - 1))
            for name, layout in LAYOUTS.items()
        }
    head = ["", "gain measured", "predicted", "off by", "Megatron measured/predicted", "DIP measured/predicted"]
    console.print(text_table(head, [
        [name, f"{row['measured_gain']:.3f}", f"{row['predicted_gain']:.3f}",
         f"{row['predicted_gain'] / row['measured_gain'] - 1:+.1%}", f"{row['megatron']:.3f}", f"{row['dip']:.3f}"]
        for name, row in rows.items()
    ]), highlight=False, soft_wrap=True)  # fmt: skip
    best = min(rows.values(), key=lambda row: row["measured_gain"])
    met = abs(best["predicted_gain"] / best["measured_gain"] - 1) <= BAR
    verdict = "met" if met else "MISSED"
    console.print(f"within {BAR:.0%}: {verdict}", highlight=False)
    console.print(f"outside of its schedule an iteration takes {1e3 * rest:.0f} ms", highlight=False)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    console.print(f"load average {load} on {os.cpu_count()} cores", highlight=False)
    if path is not None:
        path.write_text(json.dumps({"rows": rows, "rest": rest, "load_average": os.getloadavg()}, indent=1))


if __name__ == "__main__":
    main()
