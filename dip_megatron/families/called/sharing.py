"""An encoder that every tensor-parallel rank holds whole: each encodes some of a unit's instances.

Megatron-Bridge and mcore-bridge let every such rank encode all of them. Here each gets a share, and what the shares
have become is gathered where the encoder ends. Behind that all ranks do the same, so that all have the same gradient of
it; each takes the rows that are its own. Its parameters then get the gradients of its share alone: Megatron averages
them over these ranks at the end of the iteration, as Bridge asks of it for all of Hugging Face's modules, and the sum
is what is wanted, hence the factor in :class:`_Gather`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from ...compat.averages import average_over_tensor_ranks
from ...describe.workload import shares
from .shapes import HiddenShape


@dataclass(frozen=True)
class UnitShare:
    """This ``rank``'s share of a unit: ``own`` are the microbatch's instances that it encodes. A rank without a share
    encodes one of another's, which nobody takes: all ranks then have gradients, of whatever value. ``instances``,
    ``tokens``: what each rank's share is of. Of hidden states it has ``rows``, and all ranks hand on ``longest``."""

    rank: int
    own: slice
    instances: tuple[int, ...]
    tokens: tuple[int, ...]
    rows: int
    longest: int

    @staticmethod
    def of(unit: tuple[int, ...], own: slice, ranks: int, rank: int, hidden: HiddenShape) -> UnitShare:
        """``own`` are the unit's instances, which become so many tokens each."""
        parts = shares(unit, ranks)
        first, count = parts[rank] if parts[rank][1] else (unit.index(min(unit)), 1)
        given = [unit[start : start + length] for start, length in parts]
        return UnitShare(
            rank, slice(own.start + first, own.start + first + count),
            tuple(length for _, length in parts), tuple(map(sum, given)),
            hidden.of(unit[first : first + count])[0], max(hidden.of(part)[0] for part in given),
        )  # fmt: skip

    def arriving(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states as they travel, this rank's."""
        return hidden[: self.rows]

    def leaving(self, hidden: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`arriving`: as long on all ranks."""
        room = (0, 0) * (hidden.dim() - 1) + (0, self.longest - hidden.shape[0])
        return F.pad(hidden, room) if room[-1] else hidden

    def gathered(self, rows: torch.Tensor, counts: tuple[int, ...], agree: bool = True) -> torch.Tensor:
        """What all ranks have made, ``counts`` rows each, of what this one has. ``agree``: all will have the same
        gradient of it."""
        whole: torch.Tensor = _Gather.apply(rows, counts, self.rank, agree)
        return whole


class _Gather(torch.autograd.Function):
    """The backward gives a rank its own rows' gradient, times the ranks over which Megatron takes a mean. Where ranks
    don't agree on it, the mean of what each has is what they would have without shares."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: tuple[int, ...], rank: int, agree: bool) -> torch.Tensor:
        ctx.counts, ctx.rank, ctx.shape, ctx.agree = counts, rank, rows.shape, agree
        longest = max(counts)
        own = rows.new_zeros(longest, *rows.shape[1:])
        own[: counts[rank]] = rows[: counts[rank]]
        every = rows.new_empty(len(counts) * longest, *rows.shape[1:])
        torch.distributed.all_gather_into_tensor(every, own, group=parallel_state.get_tensor_model_parallel_group())
        return torch.cat([part[:count] for part, count in zip(every.split(longest), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        if ctx.agree:
            gradient = gradient * len(ctx.counts)
        else:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            torch.distributed.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
        own = gradient.new_zeros(ctx.shape)
        count, start = ctx.counts[ctx.rank], sum(ctx.counts[: ctx.rank])
        own[:count] = gradient[start : start + count]
        return own, None, None, None


def sum_over_ranks(model: torch.nn.Module, gathered: torch.nn.Module | None) -> None:
    """See the module: of all that trains in ``model`` but what comes behind the gathering. Raises ValueError for
    matrices that are split."""
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
