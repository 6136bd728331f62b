"""The machine: devices to train on, cores to plan on."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Iterator

from .check import Check, Status
from .libraries import importable


def devices() -> Iterator[Check]:
    """GPUs, and what ranks talk through."""
    if not importable("torch"):
        return
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        yield Check(
            "devices", Status.LIMITED, "no GPU; Megatron runs on CPU ranks over gloo",
            "good for trying, planning and tests: stages take milliseconds, and times say nothing of a cluster",
        )  # fmt: skip
        return
    count = torch.cuda.device_count()
    kinds = Counter((p.name, p.total_memory) for p in map(torch.cuda.get_device_properties, range(count)))
    detail = ", ".join(f"{n} x {name} with {memory / 1e9:.0f} GB" for (name, memory), n in kinds.items())
    if torch.distributed.is_nccl_available():
        yield Check("devices", Status.OK, f"{detail}; NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    else:
        yield Check(
            "devices", Status.LIMITED, f"{detail}; torch is built without NCCL",
            "what ranks exchange passes through host memory", "install a torch with NCCL",
        )  # fmt: skip


def cores() -> Iterator[Check]:
    """CPU cores that plans may be searched on."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count < 2:
        yield Check(
            "cores for planning", Status.LIMITED, f"{count} core", "the search takes the trainer's time",
            "give the process more cores, or plan with --dip-schedule static",
        )  # fmt: skip
        return
    most = count // 2
    yield Check(
        "cores for planning", Status.OK,
        f"{count} cores: up to {most} search thread{'s' if most > 1 else ''} on this host, shared by the pipelines "
        "that are planned here (--dip-planner-workers, default 1)",
    )  # fmt: skip
