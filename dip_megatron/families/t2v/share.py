"""What of a microbatch's clips a context-parallel rank has: of each clip's patches its shard, all of the prompts.

Clips needn't divide: behind each stands as much room as all ranks together need. Rows of it hold copies of the clip's
last patch, which nothing attends to and no loss counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from ..shared.shapes import shard_lengths
from ..shared.shards import padded_lengths, padded_rows, whole_order


@dataclass(frozen=True)
class Share:
    """One of ``ranks`` ranks of ``group``; clips are given by their ``lengths`` in patches."""

    ranks: int = 1
    rank: int = 0
    group: Any = None

    def lengths(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Rows of each clip on this rank."""
        return shard_lengths(lengths, self.ranks)

    def rows(self, patches: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        """This rank's rows of ``patches`` ``[t, ...]`` of all clips."""
        if self.ranks == 1:
            return patches
        return patches[padded_rows(lengths, self.ranks, self.rank)[0].to(patches.device)]

    def real(self, rows: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        """Of this rank's ``rows``, those that are patches."""
        if self.ranks == 1:
            return rows
        return rows[padded_rows(lengths, self.ranks, self.rank)[1].to(rows.device)]

    def whole(self, rows: torch.Tensor, lengths: tuple[int, ...]) -> list[torch.Tensor]:
        """The patches of each clip, from the rows of all ranks, which call it together."""
        if self.ranks == 1:
            return list(rows.split(lengths))
        padded = padded_lengths(lengths, self.ranks)
        gathered = gather_from_sequence_parallel_region(rows, True, self.group)
        ordered = gathered[whole_order(padded, self.ranks, rows.device)]
        return [clip[:length] for clip, length in zip(ordered.split(padded), lengths, strict=True)]


def share_of(config: Any, pg_collection: Any = None) -> Share:
    """This rank's, of a model with this config."""
    if config.context_parallel_size == 1:
        return Share()
    given = getattr(pg_collection, "cp", None)
    group = parallel_state.get_context_parallel_group() if given is None else given
    return Share(dist.get_world_size(group), dist.get_rank(group), group)
