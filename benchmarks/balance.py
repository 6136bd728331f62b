"""scripts/bench balance: replicas that exchange microbatches while they train, on CPU ranks.

    scripts/bench balance [--replicas 2,4] [--iterations 15] [--token-seconds 0.003] [--json FILE]

Pipelines of two ranks train a small GPT through DIP's hook, planner, executor and exchange as any loop would; every
second replica reads documents twice as long. Each operation lasts as long as its tokens say (it sleeps once it has
computed), as if every rank had a device of its own, so that more ranks than cores can be measured. Each number of
replicas trains without and with the exchange, in turn; the first third of the iterations, in which measured times
correct the prices, is left out. Printed: by how much an iteration got shorter, by how much the plans said it would, and
how long training waited for the exchange; of an iteration with it, by how much operations of the rank that is worst off
were late (the host had no core for them), what is not under plans (gradients are reduced, ranks wait for the last), and
what all ranks and planners took of the host's cores. Fewer cores: ``taskset -c 0 scripts/bench balance``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STAGES, MICROBATCHES = 2, 8
PREDICTION, STALL = 0.05, 0.01


def main() -> None:
    """Start the ranks of every run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", default="2,4")
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--token-seconds", type=float, default=3e-3, help="a stage's forward takes for a token")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which a run is stopped")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--worker", nargs=4, metavar=("MODE", "ITERATIONS", "TOKEN_SECONDS", "FOLDER"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.worker:
        mode, iterations, token_seconds, folder = options.worker
        work(mode, int(iterations), float(token_seconds), Path(folder))
        return
    from benchmarks.shared.ranks import run_ranks
    from dip_megatron.report.schedules import text_table

    rows, data = [], []
    for replicas in map(int, options.replicas.split(",")):
        seen = {}
        with tempfile.TemporaryDirectory() as folder:
            for mode in ("off", "swap"):
                out = Path(folder) / mode
                out.mkdir()
                command = [
                    sys.executable, "-m", "benchmarks.balance", "--worker", mode, str(options.iterations),
                    str(options.token_seconds), str(out),
                ]  # fmt: skip
                if run_ranks(command, replicas * STAGES, out, options.limit):
                    sys.exit(1)
                seen[mode] = read(out, replicas, options.iterations)
        off, swap = seen["off"], seen["swap"]
        measured, predicted = (off[key] / swap[key] for key in ("seconds", "predicted"))
        row = {
            "replicas": replicas, "seconds_off": off["seconds"], "seconds_swap": swap["seconds"],
            "gain": measured, "predicted_gain": predicted,
            "predicted_off": off["predicted"], "predicted_swap": swap["predicted"], "moved": swap["moved"],
            "exchange_seconds": swap["exchange"], "stall_share": swap["stall"] / swap["seconds"],
            **{f"{key}_{mode}": seen[mode][key] for key in ("slowest_replica", "late", "core") for mode in seen},
        }  # fmt: skip
        data.append(row)
        met = abs(measured / predicted - 1) <= PREDICTION and row["stall_share"] <= STALL
        rows.append([
            str(replicas), f"{off['seconds']:.3f}", f"{off['predicted']:.3f}", f"{swap['seconds']:.3f}",
            f"{swap['predicted']:.3f}", f"{measured:.3f}", f"{predicted:.3f}",
            f"{swap['moved']:.1f}", f"{1e3 * swap['exchange']:.1f}", f"{row['stall_share']:.2%}",
            f"{swap['late']:.3f}", f"{swap['seconds'] - swap['slowest_replica']:.3f}", f"{swap['core']:.3f}",
            "met" if met else "MISSED",
        ])  # fmt: skip
    head = ["replicas", "s off", "planned", "s swap", "planned", "gain", "predicted", "moved", "exchange ms", "waited",
            "s late", "s after", "s of cores", f"within {PREDICTION:.0%}, <= {STALL:.0%}"]  # fmt: skip
    print(f"Measured on CPU ranks that emulate devices, {STAGES} pipeline ranks a replica, "
          f"{len(os.sched_getaffinity(0))} cores\n")  # fmt: skip
    print(text_table(head, rows))
    if options.json is not None:
        options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read(out: Path, replicas: int, iterations: int) -> dict[str, float]:
    """Medians over the iterations that count, of what the ranks of a run wrote down."""
    skipped = iterations // 3
    traces = []
    for r in range(replicas):
        path = out / ("." if r == 0 else f"dp{r}_tp0") / "iterations.jsonl"
        traces.append([json.loads(line) for line in path.read_text().splitlines()][skipped:])
    exchanges = [line["exchange"] for line in traces[0] if line["exchange"] is not None]
    seconds = json.loads((out / "seconds.json").read_text())[skipped:]
    slowest, longest = (
        [max(line[key] for line in together) for together in zip(*traces, strict=True)]
        for key in ("predicted_seconds", "iteration_seconds")
    )
    ranks = [json.loads((out / f"host.rank{r}.json").read_text()) for r in range(replicas * STAGES)]
    late, core = ([rank[key][skipped:] for rank in ranks] for key in ("late", "core"))
    planning = [[line["planner_core_seconds"] for line in trace] for trace in traces]
    stalls = [max(line["exchange"]["stall_seconds"] for line in together if line["exchange"])
              for together in zip(*traces, strict=True)] if exchanges else [0.0]  # fmt: skip
    return {
        "seconds": statistics.median(seconds), "predicted": statistics.median(slowest),
        "slowest_replica": statistics.median(longest), "late": statistics.median(map(max, zip(*late, strict=True))),
        "core": statistics.median(map(sum, zip(*core, *planning, strict=True))),
        "moved": statistics.fmean([e["moved"] for e in exchanges] or [0.0]),
        "exchange": statistics.median([e["seconds"] for e in exchanges] or [0.0]),
        "stall": statistics.fmean(stalls),
    }  # fmt: skip


def emulate(seconds_per_token: float) -> list[float]:
    """Let operations last as long as a device would take for their tokens. What is returned gets by how much each was
    late all the same: its computing took longer, or the host had no core for it when its time was over."""
    from dip_megatron.core import Kind
    from dip_megatron.runtime.chunk_runner import ChunkRunner

    late: list[float] = []
    shares = {Kind.F: 1.0, Kind.B: 1.0, Kind.W: 1.0, Kind.BW: 2.0}

    def lasting(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, operation: Any, unit: Any, *rest: Any) -> Any:
            began = time.perf_counter()
            result = method(self, operation, unit, *rest)
            tokens = self._state.microbatches[unit.microbatch].arguments["input_ids"].shape[1]
            end = began + shares[operation.kind] * seconds_per_token * tokens
            time.sleep(max(end - time.perf_counter(), 0.0))
            late.append(time.perf_counter() - end)
            return result

        return run

    for name in ("forward", "backward", "weight"):
        setattr(ChunkRunner, name, lasting(getattr(ChunkRunner, name)))
    return late


def work(mode: str, iterations: int, token_seconds: float, out: Path) -> None:
    """One rank of a run."""
    import torch
    import torch.distributed as dist

    from examples.any_loop import train as loop  # installs DIP's hook

    import dip_megatron  # isort: skip
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    late = emulate(token_seconds)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=STAGES)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    iteration = 0
    stages = dip_megatron.build_model(
        loop.provide, micro_batch_size=1, num_microbatches=MICROBATCHES, read_ahead=True, schedule="dynamic",
        another_follows=lambda: iteration + 1 < iterations, balance=mode, trace_dir=str(out), search_budget=0.05,
        modules={"language": {"layers": [[2, 2]]}}, log_interval=iterations,
    )  # fmt: skip
    chunks = [DistributedDataParallel(s.config, DistributedDataParallelConfig(), s) for s in stages]
    get_model_config(chunks[0]).finalize_model_grads_func = finalize_model_grads
    replica = parallel_state.get_data_parallel_rank()

    def microbatches() -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(replica)
        while True:
            length = int(torch.randint(16, 33, (), generator=generator)) * (1 + replica % 2)
            ids = torch.randint(0, loop.VOCABULARY, (1, length + 1), generator=generator)
            yield {"tokens": ids[:, :-1], "labels": ids[:, 1:]}

    data, seconds, late_seconds, core_seconds = microbatches(), [], [], []
    for iteration in range(iterations):  # noqa: B007  # another_follows looks at it
        for chunk in chunks:
            chunk.zero_grad_buffer()
        dist.barrier()
        late.clear()
        began, core_began = time.perf_counter(), time.process_time()
        get_forward_backward_func()(
            forward_step_func=loop.forward_step, data_iterator=data, model=chunks, num_microbatches=MICROBATCHES,
            seq_length=loop.LENGTH, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        late_seconds.append(sum(late))
        dist.barrier()
        seconds.append(time.perf_counter() - began)
        core_seconds.append(time.process_time() - core_began)
    host = {"late": late_seconds, "core": core_seconds}
    (out / f"host.rank{dist.get_rank()}.json").write_text(json.dumps(host))
    if dist.get_rank() == 0:
        (out / "seconds.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
