"""The benchmark's table."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table


def summarize(results: list[dict[str, Any]], peak_flops: float) -> list[dict[str, Any]]:
    """One line per schedule: medians over its iterations. ``peak_flops`` is what all ranks together could do."""
    lines = []
    base = next((r for r in results if r["name"] == "megatron-interleaved" and r["iterations"]), None)
    reference = next((r for r in results if r["iterations"]), None)
    for result in results:
        line: dict[str, Any] = {"name": result["name"], "failure": result.get("failure", "")}
        runs = result["iterations"]
        if runs:
            seconds = [run["seconds"] for run in runs]
            predicted = [run["predicted_seconds"] for run in runs]
            errors = [abs(p / s - 1.0) for p, s in zip(predicted, seconds, strict=True)]
            line |= {
                "seconds": statistics.mean(seconds),
                "median_seconds": statistics.median(seconds),
                "spread": statistics.pstdev(seconds) / statistics.mean(seconds),
                "tokens_per_second": sum(r["tokens"] for r in runs) / sum(seconds),
                "mfu": sum(r["flops"] for r in runs) / (sum(seconds) * peak_flops),
                "bubble_measured": statistics.mean(r["bubble_measured"] for r in runs),
                "bubble_predicted": statistics.mean(r["bubble_predicted"] for r in runs),
                "predicted_seconds": statistics.mean(predicted),
                "prediction_error": statistics.mean(errors),
                "bias": sum(predicted) / sum(seconds) - 1.0,
                "peak_gb": max(max(r["peak_bytes"]) for r in runs) / 1e9,
                "predicted_peak_gb": max(max(r["predicted_peak_bytes"]) for r in runs) / 1e9,
            }
            if base is not None:
                line["speedup"] = _matched(base["iterations"], runs)
            line["loss_difference"] = difference(reference["iterations"], runs, "loss") if reference else 0.0
            line["norm_difference"] = difference(reference["iterations"], runs, "gradient_norm") if reference else 0.0
        lines.append(line)
    return lines


def _matched(base: list[dict[str, Any]], runs: list[dict[str, Any]]) -> float:
    """Ratio of the total seconds over the same batches."""
    ours = sum(r["seconds"] for r in runs)
    return sum(r["seconds"] for r in base) / ours if len(base) == len(runs) else float("nan")


def difference(reference: list[dict[str, Any]], runs: list[dict[str, Any]], what: str) -> float:
    """Largest relative difference of an iteration's loss, or of its gradient's norm."""
    return max(abs(a[what] - b[what]) / abs(a[what]) for a, b in zip(reference, runs, strict=False))


def print_table(lines: list[dict[str, Any]], title: str) -> None:
    """Print the summary."""
    table = Table(title=title)
    for header in ("schedule", "s/iteration", "spread", "tokens/s", "MFU", "vs. interleaved", "bubble (planned)",
                   "planned s (error)", "peak GB (planned)", "differs: loss, gradient"):  # fmt: skip
        table.add_column(header, justify="left" if header == "schedule" else "right")
    for line in lines:
        if "seconds" not in line:
            table.add_row(line["name"], f"[red]{line['failure'][:60]}")
            continue
        table.add_row(
            line["name"], f"{line['seconds']:.3f}", f"{line['spread']:.1%}", f"{line['tokens_per_second']:.0f}",
            f"{line['mfu']:.1%}", f"{line['speedup']:.2f}x" if "speedup" in line else "",
            f"{line['bubble_measured']:.1%} ({line['bubble_predicted']:.1%})",
            f"{line['predicted_seconds']:.3f} ({line['prediction_error']:.1%})",
            f"{line['peak_gb']:.1f} ({line['predicted_peak_gb']:.1f})",
            f"{line['loss_difference']:.0e}, {line['norm_difference']:.0e}",
        )  # fmt: skip
    Console(width=180).print(table)
