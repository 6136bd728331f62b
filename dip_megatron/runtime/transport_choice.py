"""Chooses the transport of a pipeline by the devices of its ranks."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from ..core.protocols import Exchange
from .ipc import IpcTransport
from .shared_counters import AVAILABLE
from .staging import StagingTransport
from .transport import DistributedTransport, Transport

TransportKind = Literal["gloo", "nccl", "ipc", "staging"]


@dataclass(frozen=True)
class Place:
    """Where a rank computes.

    Attributes:
        host: Differs unless two processes share a kernel and its IPC and mount namespaces.
        device: Unique id of the GPU; empty for the CPU.
        blocking: Whether CUDA_LAUNCH_BLOCKING makes the host wait for every kernel.
    """

    host: str
    device: str
    blocking: bool = False


def place_of(device: torch.device) -> Place:
    """Return where this process computes."""
    identity = socket.gethostname()
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/ipc", "/proc/self/ns/mnt"):
        try:
            identity += "/" + (os.readlink(path) if "/ns/" in path else Path(path).read_text().strip())
        except OSError:
            continue
    if device.type != "cuda":
        return Place(identity, "")
    blocking = os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0")
    return Place(identity, str(torch.cuda.get_device_properties(device).uuid), blocking)


def transport_kind(places: Sequence[Place], nccl: bool = True, shared: bool = AVAILABLE) -> tuple[TransportKind, str]:
    """Choose the transport of a pipeline.

    Args:
        places: Where each rank computes.
        nccl: Whether torch has NCCL.
        shared: Whether the system supports what ranks need to share memory.

    Returns:
        The transport, and the reason in a few words.
    """
    if not places[0].device:
        if len({p.host for p in places}) > 1:
            return "gloo", "the ranks compute on CPUs of several hosts"
        return ("ipc", "the ranks compute on one host's CPUs") if shared else ("gloo", "this system has no eventfd")
    devices = {(p.host, p.device) for p in places}
    if len(devices) == len(places):
        if any(p.blocking for p in places):
            return "staging", "with CUDA_LAUNCH_BLOCKING hosts would wait for the messages that they are ready to take"
        if nccl:
            return "nccl", "every rank has a GPU of its own"
        return "staging", "this torch has no NCCL"
    if len(devices) == 1 and shared:
        return "ipc", f"{len(places)} ranks share one GPU, which NCCL refuses"
    return "staging", f"{len(places)} ranks share {len(devices)} GPUs, which NCCL refuses"


def choose_transport(
    global_ranks: list[int],
    rank: int,
    device: torch.device,
    timeout_seconds: float,
    exchange: Exchange,
    kind: TransportKind | None = None,
    *,
    replicated: bool = False,
) -> Transport:
    """Create the transport of one pipeline rank. All ranks of the pipeline call it at the same time. The first rank
    prints the choice if it is an unusual one.

    Args:
        global_ranks: Global rank of each pipeline rank.
        rank: This process's pipeline rank.
        device: Device of this rank.
        timeout_seconds: Bound on every wait.
        exchange: Gathers data among the pipeline's ranks.
        kind: Overrides the choice.
        replicated: Whether the model has modules that are replicated on every rank.
    """
    gathered = exchange.gather(json.dumps(astuple(place_of(device))).encode())
    chosen, reason = transport_kind([Place(*json.loads(data)) for data in gathered], dist.is_nccl_available())
    if kind is not None:
        chosen, reason = kind, "as asked"
    if rank == 0 and device.type == "cuda" and chosen in ("ipc", "staging"):
        way = {"ipc": "CUDA IPC", "staging": "host memory and gloo"}
        print(f"[dip] stages exchange tensors through {way[chosen]}: {reason}", flush=True)
    if chosen == "ipc":
        return IpcTransport(len(global_ranks), rank, device, exchange, timeout_seconds, replicated=replicated)
    if chosen == "staging":
        return StagingTransport(global_ranks, rank, device, timeout_seconds, replicated)
    return DistributedTransport(global_ranks, rank, device, timeout_seconds, replicated)
