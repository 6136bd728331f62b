"""Which replicas share experts: by the ranks of replicas and of groups of experts."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")

from dip_megatron.describe.files import ConfigurationError
from dip_megatron.megatron.coupling import joined


def told(pp: int, dp: int, ep: int):
    """As Megatron numbers ranks without tensor parallelism: data parallel within, pipeline without."""
    rows = []
    for rank in range(pp * dp):
        stage, replica = divmod(rank, dp)
        first = stage * dp + replica // ep * ep
        rows.append((tuple(replica + p * dp for p in range(pp)), tuple(range(first, first + ep))))
    return rows


def test_replicas_of_one_group_of_experts_plan_together():
    ranks, coupled = joined(told(pp=2, dp=8, ep=4), rank=13)  # stage 1 of replica 5
    assert ranks == [4, 5, 6, 7, 12, 13, 14, 15]
    assert coupled.replica == 1
    assert [[ranks[place] for place in replica] for replica in coupled.replicas] == [[4, 12], [5, 13], [6, 14], [7, 15]]
    assert [ranks[place] for place in coupled.replicas[coupled.replica]] == [5, 13]
    alone, of_one = joined(told(pp=2, dp=2, ep=1), rank=1)
    assert (alone, of_one.replicas) == ([1, 3], ((0, 1),))


def test_replicas_of_other_sizes_are_refused():
    rows = [((0,), (0, 1)), ((1, 2), (0, 1)), ((1, 2), (2,))]
    with pytest.raises(ConfigurationError, match=r"have \[1, 2\] ranks"):
        joined(rows, 0)
