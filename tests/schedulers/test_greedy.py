"""The plain fallback of the planner: always a valid plan within memory, or an error that says what is missing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core import Kind
from dip_megatron.core.lower import make_plan
from dip_megatron.core.verify import verify
from dip_megatron.planner.model_graphs import without_training
from dip_megatron.schedulers.dip.feasibility import DoesNotFitError
from dip_megatron.schedulers.greedy import greedy
from tests.drawn import settings
from tests.graphs import random_graph, smallest_need


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1.1, 1.5, 2.0, np.inf]), st.booleans())
def test_plans_are_valid_and_fit(seed, memory, train):
    graph = random_graph(seed, memory=memory)
    if not train:
        graph = without_training(graph)
    verify(make_plan(graph, greedy(graph), lower_bound=0.0))


def test_says_how_much_is_missing():
    graph = random_graph(5, ranks=2, microbatches=2, memory=1.0)
    graph = replace(graph, memory_limit=graph.static_bytes + 0.5 * smallest_need(graph))
    with pytest.raises(DoesNotFitError, match=r"rank \d+ is short of .* bytes\) for microbatch \d+ alone"):
        greedy(graph)


def test_alternates_forwards_and_backwards():
    graph = random_graph(0, ranks=1, microbatches=4, memory=np.inf, frozen=False)
    kinds = [code // graph.virtual_microbatches for code in greedy(graph).orders[0].tolist()]
    assert kinds[0] == Kind.F
    assert kinds != sorted(kinds)
