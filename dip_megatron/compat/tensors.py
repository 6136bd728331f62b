"""torch's tensors and streams from the inside."""

from __future__ import annotations

from typing import Any

import torch

from .names import Name, Topic

TOPIC = Topic(
    "activations in host memory, and times of GPU kernels",
    "torch",
    "2.13.0, 2.15.0",
    "layers can't be offloaded (offload: false), and dip profile can't measure a GPU",
    (
        Name("torch:Tensor._version"),
        Name("torch:UntypedStorage._cdata"),
        Name("torch.multiprocessing.reductions:StorageWeakRef", ("storage",)),
        Name("torch.cuda:_sleep"),
    ),
)


def storage_id(storage: Any) -> int:
    """Which storage it is, as long as it lives."""
    number: int = storage._cdata
    return number


def version(tensor: torch.Tensor) -> int:
    """How often a tensor has been written in place."""
    return tensor._version


def keep_busy(cycles: int) -> None:
    """Let the current GPU do nothing for so many clock cycles, behind what it has been given."""
    torch.cuda._sleep(cycles)
