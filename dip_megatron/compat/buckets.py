"""Gradient and parameter buckets of Megatron-Core's DistributedDataParallel."""

from __future__ import annotations

from typing import Any

import torch

from .names import Name, Topic

TOPIC = Topic(
    "data-parallel communication in an order of our own",
    "megatron-core",
    "0.16.1, 0.19.2",
    "with several replicas, --overlap-grad-reduce and --overlap-param-gather can't run",
    (
        Name(
            "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel",
            has=("bucket_groups", "expert_parallel_bucket_groups", "remove_forward_pre_hook_handles",
                 "force_all_reduce", "no_sync"),
        ),
        Name(
            "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup",
            has=("next_param_gather_bucket_group", "param_gather_dispatched", "param_gather_handle"),
        ),
        Name(
            "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_grad_sync",
            ("*", "force_all_reduce"),
        ),
        Name("megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_param_sync", ()),
        Name(
            "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.finish_param_sync",
            ("*", "skip_next_bucket_dispatch"),
        ),
    ),
)  # fmt: skip


def start_gradient_reduction(chunk: torch.nn.Module) -> None:
    """Start the reduction of all of a chunk's gradients. Parameters that no stage has waited for may have been gathered
    into their memory (in MXFP8, and for optimizers that work layer by layer); it is cleared once they are taken from
    there."""
    for bucket in _groups(chunk):
        finish_gather(bucket)
        bucket.start_grad_sync(force_all_reduce=getattr(chunk, "force_all_reduce", False))


def to_gather(chunk: torch.nn.Module) -> list[Any]:
    """Groups of a chunk's parameters that are to be gathered in this iteration, first layers first."""
    # Megatron takes the hooks away for an iteration whose parameters are known to be whole. Within a chunk the last
    # bucket holds the first layers.
    return list(reversed(_groups(chunk))) if getattr(chunk, "remove_forward_pre_hook_handles", None) else []


def start_gather(group: Any) -> None:
    """Start a group's gather, and leave none for hooks to start."""
    group.next_param_gather_bucket_group = None
    if not group.param_gather_dispatched:
        group.start_param_sync()


def finish_gather(group: Any) -> None:
    """Wait for a group's gather, if nothing has."""
    if group.param_gather_handle is not None:
        group.finish_param_sync(skip_next_bucket_dispatch=True)


def _groups(chunk: torch.nn.Module) -> list[Any]:
    return [*getattr(chunk, "bucket_groups", ()), *getattr(chunk, "expert_parallel_bucket_groups", ())]
