"""Which ranks are one data-parallel replica: those that train on the same microbatches, under one plan."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state


def replica_ranks() -> list[int]:
    """Global ranks of this rank's replica, sorted: its tensor- and pipeline-parallel ranks and, as they hold shards of
    the same sequences, those of all its context-parallel ranks. All ranks of the replica call it together."""
    mine = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
    context = parallel_state.get_context_parallel_group()
    if dist.get_world_size(context) == 1:
        return sorted(mine)
    told: list[Any] = [None] * dist.get_world_size(context)
    dist.all_gather_object(told, mine, group=context)
    return sorted(rank for ranks in told for rank in ranks)


def replica_folder() -> str:
    """Traces of one pipeline each: the trace directory itself for the first, a folder for each other."""
    data, tensor = parallel_state.get_data_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    context = parallel_state.get_context_parallel_rank()
    more = f"_cp{context}" if context else ""
    return "." if data == tensor == context == 0 else f"dp{data}_tp{tensor}{more}"
