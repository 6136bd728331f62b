"""Shares of a unit's instances: consecutive, all of them, the largest as small as can be."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.describe.workload import shares


def least(tokens: tuple[int, ...], ranks: int) -> int:
    """The most tokens of a share in the best way to cut, tried one by one."""

    @cache
    def best(first: int, left: int) -> int:
        if left == 1 or first == len(tokens):
            return sum(tokens[first:])
        return min(
            max(sum(tokens[first:end]), best(end, left - 1)) for end in range(first, len(tokens) + 1)
        )  # fmt: skip

    return best(0, ranks)


@given(tokens=st.lists(st.integers(1, 400), max_size=9).map(tuple), ranks=st.integers(1, 5))
def test_shares_are_as_even_as_can_be(tokens, ranks):
    found = shares(tokens, ranks)
    assert len(found) == ranks
    assert [i for first, count in found for i in range(first, first + count)] == list(range(len(tokens)))
    assert max(sum(tokens[first : first + count]) for first, count in found) == least(tokens, ranks)


@pytest.mark.parametrize(
    ("tokens", "ranks", "counts"),
    [((), 3, (0, 0, 0)), ((7,), 2, (1, 0)), ((5, 5, 5, 5), 2, (2, 2)), ((9, 1, 1, 1), 2, (1, 3))],
)
def test_known_shares(tokens, ranks, counts):
    assert tuple(count for _, count in shares(tokens, ranks)) == counts
