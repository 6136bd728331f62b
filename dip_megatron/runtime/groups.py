"""Process groups whose creation involves only their members."""

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
    """Create a process group without the participation of ranks outside it.

    Members find each other by the group's name. torch derives that name from the number of groups a process has created
    or joined, on which ranks need not agree; they would then wait for each other until a timeout. Here the name is
    derived from the number of groups with exactly these ranks, which is the same on all members.

    Args:
        ranks: Global ranks of the members.
        backend: ``nccl`` or ``gloo``.
        timeout: Timeout of the group's operations.
        device: Device of the group, for NCCL.
        blocks: Most thread blocks that an NCCL operation may occupy; must be equal on all members.
    """
    members = sorted(ranks)
    text = f"dip {members} {groups_of(members)}"
    options = {"pg_options": nccl_options(blocks, timeout), "device_id": device} if backend == "nccl" else {}
    with of_its_own(), group_named(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()):
        return dist.new_group(members, timeout=timeout, backend=backend, use_local_synchronization=True, **options)
