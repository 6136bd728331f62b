"""Megatron on ranks that share a GPU: ``--distributed-backend gloo`` with tensors on the device.

NCCL refuses a communicator with two ranks on one device, and gloo refuses some collectives of CUDA tensors (among them
the coalesced all-reduce of DDP's gradients). With one replica, those run in groups of a single rank, which NCCL serves.
Pipeline traffic doesn't come here (:mod:`dip_megatron.runtime.transport_choice`). Start all ranks with LOCAL_RANK=0.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

from ..compat.ranks_on_one_gpu import group_maker, replace_group_maker

_MARK = "dip_megatron_single_ranks"


def single_ranks_on_nccl(args: Any) -> bool:
    """Give Megatron's groups of one rank NCCL, if its backend is gloo although there is a GPU; whether it did.

    Call it before Megatron makes its groups. ``args`` are Megatron's.
    """
    if args.distributed_backend != "gloo" or not torch.cuda.is_available() or not dist.is_nccl_available():
        return False
    original = group_maker()
    if hasattr(original, _MARK):
        return True

    @functools.wraps(original)
    def create_group(ranks: Any = None, timeout: Any = None, backend: Any = None, *rest: Any, **options: Any) -> Any:
        if backend is None and ranks is not None and len(ranks) == 1:
            backend = "nccl"
        return original(ranks, timeout, backend, *rest, **options)

    setattr(create_group, _MARK, True)
    replace_group_maker(create_group)
    return True
