"""Shards of sequences over context-parallel ranks, as Megatron and Transformer Engine cut them: of each sequence in 2 N
equal pieces, rank r of N has pieces r and 2 N - 1 - r, so that all have as much of a causal attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from .shapes import shard_lengths


def shard_rows(lengths: Sequence[int], ranks: int, rank: int) -> torch.Tensor:
    """Positions, in sequences of these ``lengths`` one after the other, of the rows that a rank has, in their order.
    Raises ValueError for a length that 2 ``ranks`` don't divide."""
    odd = [length for length in lengths if length % (2 * ranks)]
    if odd:
        raise ValueError(
            f"sequences of {odd} tokens can't be cut into {2 * ranks} equal pieces for {ranks} context-parallel ranks; "
            f"pad them to a multiple of {2 * ranks}"
        )
    rows, start = [], 0
    for length in lengths:
        pieces = torch.arange(start, start + length).view(2 * ranks, -1)
        rows += [pieces[rank], pieces[2 * ranks - 1 - rank]]
        start += length
    return torch.cat(rows)


def padded_lengths(lengths: Sequence[int], ranks: int) -> tuple[int, ...]:
    """The least lengths that so many ranks can share."""
    return tuple(ranks * rows for rows in shard_lengths(lengths, ranks))


@lru_cache(maxsize=64)
def padded_rows(lengths: tuple[int, ...], ranks: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of sequences of these lengths one after the other, each with room behind it so that ranks can share it: the
    positions of a rank's rows, the sequence's last one where there is none; and which of the rows are positions."""
    padded = padded_lengths(lengths, ranks)
    rows = shard_rows(padded, ranks, rank)
    where, real = [], []
    first = first_padded = 0
    for length, room in zip(lengths, padded, strict=True):
        own = rows[(rows >= first_padded) & (rows < first_padded + room)] - first_padded
        where.append(first + own.clamp(max=length - 1))
        real.append(own < length)
        first, first_padded = first + length, first_padded + room
    return torch.cat(where), torch.nonzero(torch.cat(real))[:, 0]


@lru_cache(maxsize=64)
def whole_order(lengths: tuple[int, ...], ranks: int, device: torch.device) -> torch.Tensor:
    """Where each position of the whole sequences is in the ranks' rows one after the other."""
    gathered = torch.cat([shard_rows(lengths, ranks, rank) for rank in range(ranks)])
    return torch.argsort(gathered).to(device)
