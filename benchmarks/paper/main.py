"""The paper's tables beside ours, from the simulator: what ``scripts/reproduce_paper`` runs."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from dip_megatron.report.schedules import text_table

from . import ablation, dynamic, large_scale, memory, search_time, throughput, unit_size
from .cases import FULL, QUICK, Budget
from .record import Bar, Result

Part = Callable[[Budget, Path], Result]
PARTS: dict[str, Part] = {
    "throughput": throughput.run,
    "ablation": ablation.run,
    "unit-size": unit_size.run,
    "dynamic": dynamic.run,
    "memory": memory.run,
    "search": search_time.run,
    "large-scale": large_scale.run,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen parts; print tables, comparisons and bars; save pictures and numbers. 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="scripts/reproduce_paper", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="within ten minutes on two cores: one batch a model")
    parser.add_argument("--only", help=f"comma-separated parts, of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("out/paper"), help="folder of pictures and results.json")
    given = parser.parse_args(arguments)
    names = given.only.split(",") if given.only else list(PARTS)
    for name in names:
        if name not in PARTS:
            parser.error(f"--only: unknown part {name!r}; choose from {', '.join(PARTS)}")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {given.out} can't be made: {error.strerror}")
    return run_parts(names, QUICK if given.quick else FULL, given.out)


def run_parts(names: list[str], budget: Budget, out: Path) -> int:
    """Run the parts one after the other; 0 if all their bars are met."""
    print(
        "Numbers are quoted (from the paper, arXiv 2504.14145), simulated (our cost model and simulator: no GPU "
        "ran) or "
        f"measured (this machine: {os.cpu_count()} cores). Effort: {budget.name}."
    )
    results: dict[str, Result] = {}
    start = time.perf_counter()
    for name in names:
        began = time.perf_counter()
        results[name] = PARTS[name](budget, out)
        print(results[name].text())
        print(f"  ({time.perf_counter() - began:.0f} s)", flush=True)
    bars = [bar for result in results.values() for bar in result.bars]
    if bars:
        print("\n=== Bars\n" + text_table(["bar", "value", "target", ""], [bar.row() for bar in bars]))
    print_missed(bars)
    path = out / "results.json"
    data = {"effort": budget.name, "seconds": time.perf_counter() - start,
            "parts": {name: result.entry() for name, result in results.items()}}  # fmt: skip
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"All numbers: {path} ({time.perf_counter() - start:.0f} s in all)")
    return 0 if all(bar.met for bar in bars) else 1


def print_missed(bars: list[Bar]) -> None:
    """Why each missed bar is missed, as far as it is known."""
    for bar in bars:
        if not bar.met:
            print(f"MISSED {bar.name}: {bar.why or 'not explained'}")
