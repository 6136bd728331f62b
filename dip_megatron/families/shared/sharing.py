"""An encoder of which several ranks of a stage hold the same weights: each encodes some of a unit's instances.

Tensor-parallel ranks hold Hugging Face's encoders whole, and context-parallel ranks any encoder; in Megatron-LM,
Megatron-Bridge and mcore-bridge each of them encodes all instances. Here each gets a share, and what the shares have
become is gathered where the encoder ends. Its parameters then get the gradients of a share alone, of which Megatron
takes the sum or mean over these ranks at the end of the iteration:

- Context-parallel ranks go on with different tokens. Without shares each has the gradient of its tokens, and the sum of
  all is taken with that over replicas. With shares, the gradient of an instance is summed where it is gathered.
- Tensor-parallel ranks do the same behind the encoder, and have the same gradient of it. Megatron takes the mean over
  them, as Bridge asks of it for Hugging Face's modules, where now the sum is wanted; hence the factor in
  :class:`_Gather`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from ...compat.averages import average_over_tensor_ranks
from ...describe.workload import shares


@dataclass(frozen=True)
class Sharing:
    """Over how many ``tensor``- and ``context``-parallel ranks a unit's instances are shared out; 1: each has all."""

    tensor: int = 1
    context: int = 1

    @property
    def ranks(self) -> int:
        """Of both kinds."""
        return self.tensor * self.context

    def group(self, tensor: bool, context: bool) -> Any:
        """This rank's process group over those that share, of either kind or both; None where there is no other."""
        tensor, context = tensor and self.tensor > 1, context and self.context > 1
        if tensor and context:
            return parallel_state.get_tensor_and_context_parallel_group()
        if tensor:
            return parallel_state.get_tensor_model_parallel_group()
        return parallel_state.get_context_parallel_group() if context else None


@dataclass(frozen=True)
class UnitShare:
    """A rank's share of a unit: ``own`` are the microbatch's instances that it encodes. A rank without a share encodes
    one of another's, which nobody takes: all ranks then have gradients, of whatever value. ``instances``, ``tokens``:
    what each rank's share is of. Of hidden states it has ``rows``, and all ranks hand on ``longest``."""

    sharing: Sharing
    rank: int
    own: slice
    instances: tuple[int, ...]
    tokens: tuple[int, ...]
    rows: int
    longest: int

    @staticmethod
    def of(
        unit: tuple[int, ...], own: slice, sharing: Sharing, rows_of: Callable[[tuple[int, ...]], int]
    ) -> UnitShare:  # fmt: skip
        """This rank's. ``own`` are the unit's instances, which become so many tokens each; ``rows_of`` gives the rows
        of hidden states of instances by their tokens."""
        rank = sharing.group(True, True).rank()
        parts = shares(unit, sharing.ranks)
        first, count = parts[rank] if parts[rank][1] else (unit.index(min(unit)), 1)
        given = [unit[start : start + length] for start, length in parts]
        return UnitShare(
            sharing, rank, slice(own.start + first, own.start + first + count),
            tuple(length for _, length in parts), tuple(map(sum, given)),
            rows_of(unit[first : first + count]), max(map(rows_of, given)),
        )  # fmt: skip

    def arriving(self, hidden: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Of hidden states as they travel, this rank's."""
        return hidden.narrow(dim, 0, self.rows)

    def leaving(self, hidden: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Inverse of :meth:`arriving`: as long on all ranks."""
        more = self.longest - hidden.shape[dim]
        return F.pad(hidden, (0, 0) * (hidden.dim() - 1 - dim) + (0, more)) if more else hidden

    def gathered(self, made: torch.Tensor, counts: tuple[int, ...], dim: int = 0) -> torch.Tensor:
        """What all ranks have made, ``counts`` along ``dim`` each, of what this one has. Tensor-parallel ranks must
        have the same gradient of it."""
        whole: torch.Tensor = _Gather.apply(made.movedim(dim, 0), counts, self.rank, self.sharing)
        return whole.movedim(0, dim)


class _Gather(torch.autograd.Function):
    """The backward gives a rank its own rows' gradient: the sum over context-parallel ranks, times the tensor-parallel
    ones, over which Megatron takes a mean."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: tuple[int, ...], rank: int, sharing: Sharing) -> torch.Tensor:
        ctx.counts, ctx.rank, ctx.sharing, ctx.shape = counts, rank, sharing, rows.shape
        longest = max(counts)
        own = rows.new_zeros(longest, *rows.shape[1:])
        own[: counts[rank]] = rows[: counts[rank]]
        every = rows.new_empty(len(counts) * longest, *rows.shape[1:])
        torch.distributed.all_gather_into_tensor(every, own, group=sharing.group(True, True))
        return torch.cat([part[:count] for part, count in zip(every.split(longest), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        group = ctx.sharing.group(False, True)
        if group is not None:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            torch.distributed.all_reduce(gradient, group=group)
        count, start = ctx.counts[ctx.rank], sum(ctx.counts[: ctx.rank])
        own = gradient.new_zeros(ctx.shape)
        own[:count] = gradient[start : start + count] * ctx.sharing.tensor
        return own, None, None, None


def sum_over_ranks(model: torch.nn.Module, gathered: torch.nn.Module | None) -> None:
    """See the module: of tensor-parallel ranks, for all of ``model`` but what comes behind the gathering. Raises
    ValueError for matrices that are split."""
    behind = set() if gathered is None else set(gathered.parameters())
    for name, parameter in model.named_parameters():
        if parameter in behind:
            continue
        if getattr(parameter, "tensor_model_parallel", False):
            raise ValueError(
                f"{name} is split over tensor-parallel ranks, which have a share each of the instances; its page must "
                "say that the encoder splits"
            )
        average_over_tensor_ranks(parameter)
