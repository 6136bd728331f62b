"""Process groups that only their members create."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..compat.process_groups import group_named, groups_of


def local_group(ranks: Sequence[int], backend: str, timeout: timedelta) -> Any:
    """A new group of these global ranks, for whose making no other rank is needed.

    Members must find each other by a name. torch derives it from how many groups a process has made or joined, on which
    ranks need not agree, and then they wait for each other until they time out. Here it is how many groups there are of
    exactly these ranks: all of them are members of each.
    """
    members = sorted(ranks)
    text = f"dip {members} {groups_of(members)}"
    with group_named(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()):
        return dist.new_group(members, timeout=timeout, backend=backend, use_local_synchronization=True)
