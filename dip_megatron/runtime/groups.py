"""Process groups that only their members create."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..compat.process_groups import group_named, groups_of, nccl_options, of_its_own


def local_group(
    ranks: Sequence[int], backend: str, timeout: timedelta, device: torch.device | None = None, blocks: int = 8
) -> Any:  # fmt: skip
    """A new group of these global ranks, for whose making no other rank is needed. NCCL is given the ``device``, and
    how many ``blocks`` of threads an operation may occupy on it, the same on all ranks.

    Members must find each other by a name. torch derives it from how many groups a process has made or joined, on which
    ranks need not agree, and then they wait for each other until they time out. Here it is how many groups there are of
    exactly these ranks: all of them are members of each.
    """
    members = sorted(ranks)
    text = f"dip {members} {groups_of(members)}"
    options = {"pg_options": nccl_options(blocks, timeout), "device_id": device} if backend == "nccl" else {}
    with of_its_own(), group_named(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()):
        return dist.new_group(members, timeout=timeout, backend=backend, use_local_synchronization=True, **options)
