"""What it gains that tensor-parallel ranks share out the images of an encoder that each holds whole. Simulated.

    scripts/bench sharing [--models qwen2-5-vl-72b,...] [--batches 2] [--evaluations 2000]

Published models whose encoders are Hugging Face's, at the parallel sizes of their files, ``vlm-any-resolution``:
seconds of an iteration under DIP's plan if every tensor-parallel rank runs all images, as in Megatron-Bridge and
mcore-bridge, and if each runs a share; chunks are chosen for each on another batch.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import numpy as np

from dip_megatron.describe.cost import cost_model, load_cluster, priced_graph
from dip_megatron.describe.model import MultimodalModel, TensorParallel, load_model
from dip_megatron.describe.workload import load_workload
from dip_megatron.planner.partitioning import paper_partition
from dip_megatron.report.schedules import text_table
from dip_megatron.schedulers.dip.engine import search, warm_up

MODELS = ("qwen2-5-vl-7b", "qwen2-5-vl-32b", "qwen2-5-vl-72b", "gemma3-27b", "kimi-k2-5")
MIX = "vlm-any-resolution"


def held(model: MultimodalModel, how: TensorParallel) -> MultimodalModel:
    """The model with its encoders held so."""
    modules = (replace(m, tensor_parallel=how) if m.encodes else m for m in model.modules)
    return replace(model, modules=tuple(modules))


def seconds(model: MultimodalModel, batches: int, microbatches: int, evaluations: int) -> float:
    """Of an iteration under DIP's plans, the mean over batches."""
    cluster = load_cluster("h100")
    partition = paper_partition(model, cluster, load_workload(MIX, model, 1, microbatches, 1))
    times = []
    for batch in load_workload(MIX, model, batches, microbatches, 3):
        graph = priced_graph(cost_model(model, cluster), partition, batch.microbatches)
        times.append(search(graph, budget_seconds=1e6, evaluations=evaluations, deterministic=True).iteration_time)
    return float(np.mean(times))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--evaluations", type=int, default=2000, help="schedules tried a batch")
    options = parser.parse_args()
    warm_up()
    rows = []
    for name in options.models.split(","):
        model = load_model(name)
        every, shared = (
            seconds(held(model, how), options.batches, options.microbatches, options.evaluations)
            for how in ("whole", "shared")
        )
        parallel = model.parallel
        rows.append([name, f"{parallel.tp} x {parallel.pp} x {parallel.dp}", f"{every:.3f}", f"{shared:.3f}",
                     f"{shared / every:.3f}"])  # fmt: skip
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    print(
        f"Simulated, {options.batches} batches of {options.microbatches} microbatches, {options.evaluations} schedules"
    )
    print(text_table(["model", "TP x PP x DP", "every rank all", "shared out", "ratio"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
