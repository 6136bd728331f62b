"""Modules that stand whole on every rank of a pipeline (placement ``replicated``): copies of one set of weights.

They begin alike, their gradients are summed over the pipeline at the end of an iteration, and norms and checkpoints
know the first rank's alone. The sum comes after Megatron's own reduction over replicas: it is what all copies then step
by, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase

from ..core import ModalityModule
from ..describe.files import ConfigurationError
from ..runtime.trained import within

_ELEMENTS = 1 << 25  # of gradients that are summed at a time, beside which they stand once more


def copied(modules: Sequence[ModalityModule]) -> list[int]:
    """Indices of the chunks of replicated modules among a rank's chunks."""
    places = [m for m in modules for _ in range(m.segments)]
    return [i for i, m in enumerate(places) if m.replicated]


def begin_alike(chunks: Sequence[torch.nn.Module]) -> None:
    """Give these chunks, just built, the first rank's weights on all ranks of the pipeline, which all call it; what is
    not the first rank's counts in no norm and is saved by none."""
    group = parallel_state.get_pipeline_model_parallel_group()
    first = parallel_state.get_pipeline_model_parallel_first_rank()
    rank = parallel_state.get_pipeline_model_parallel_rank()
    for chunk in chunks:
        for tensor in (*chunk.parameters(), *chunk.buffers()):
            if not tensor.is_meta:
                _take_over(tensor.data, first, group)
        if rank > 0:
            for parameter in chunk.parameters():
                parameter.shared = True  # type: ignore[attr-defined]  # as Megatron marks the copy of an embedding
            chunk.sharded_state_dict = _replica(chunk.sharded_state_dict, rank)  # type: ignore[assignment, operator]


def _take_over(tensor: torch.Tensor, first: int, group: Any) -> None:
    """Give ``tensor`` the values it has on the ``first`` rank. A chunk that has just been built may be on the host yet,
    all of it or in part (Hugging Face's encoders, torch's own layers), where NCCL doesn't reach."""
    there = tensor
    if dist.get_backend(group) == dist.Backend.NCCL:
        there = tensor.to(torch.device("cuda", torch.cuda.current_device())).contiguous()
    dist.broadcast(there, first, group=group)
    if there is not tensor:
        tensor.copy_(there)


def check_unchanged(chunk: torch.nn.Module, built: frozenset[str]) -> None:
    """Raises ConfigurationError if parameters train that ``chunk`` was not ``built`` with (adapters): they have begun
    differently on each rank, and a norm of gradients would count them on each."""
    added = sorted(name for name, p in chunk.named_parameters() if p.requires_grad and within(name) not in built)
    if added:
        raise ConfigurationError(
            f"modules with placement: replicated can't have adapters yet, {added[0]} is one; use placement: segmented"
        )


def _replica(sharded_state_dict: Callable[..., Any], rank: int) -> Callable[..., Any]:
    def of_copy(*args: Any, **kwargs: Any) -> Any:
        state = sharded_state_dict(*args, **kwargs)
        for part in nested_values(state):
            if isinstance(part, ShardedBase):
                known = part.replica_id if isinstance(part.replica_id, tuple) else (0, part.replica_id)
                part.replica_id = (rank, *known[1:])
        return state

    return of_copy


def sum_gradients(chunks: Sequence[torch.nn.Module]) -> None:
    """Over the ranks of the pipeline, which all call it with their copies of the same chunks."""
    group = parallel_state.get_pipeline_model_parallel_group()
    for some in _together(chunks):
        flat = torch.cat([gradient.reshape(-1) for gradient in some])
        dist.all_reduce(flat, group=group)
        for gradient, summed in zip(some, flat.split([g.numel() for g in some]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def _together(chunks: Sequence[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Gradients of one dtype each time, some megabytes of them."""
    waiting: list[torch.Tensor] = []
    for parameter in (p for chunk in chunks for p in chunk.parameters() if p.requires_grad):
        gradient = _gradient(parameter)
        full = sum(g.numel() for g in waiting) >= _ELEMENTS
        if waiting and (full or waiting[0].dtype != gradient.dtype):
            yield waiting
            waiting = []
        waiting.append(gradient)
    if waiting:
        yield waiting


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Where a parameter's gradient is accumulated; zeros where no unit has left one on this rank."""
    main: torch.Tensor | None = getattr(parameter, "main_grad", None)
    if main is not None:
        return main
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
