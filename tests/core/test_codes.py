"""Compiled lowering and verifying against plain Python, on drawn plans and on plans that were tampered with."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dip_megatron.core.codes import RankActions, code_count, encode
from dip_megatron.core.lower import make_plan
from dip_megatron.core.verify import PlanError, verify
from tests.core import plain
from tests.core.simulate.test_kernels import drawn_schedule
from tests.drawn import settings
from tests.graphs import random_graph, small_graphs


def drawn_plan(graph, seed):
    graph = replace(graph, memory_limit=np.full(graph.ranks, np.inf))
    return make_plan(graph, drawn_schedule(graph, seed), lower_bound=0.0)


@settings(max_examples=100, deadline=None)
@given(small_graphs(), st.integers(0, 2**32 - 1))
def test_lowers_like_plain_python(graph, seed):
    plan = drawn_plan(graph, seed)
    actions = plain.lower(plan.graph, plan.schedule)
    assert plan.actions == actions
    assert [line.tolist() for line in encode(plan.graph, actions)] == [line.tolist() for line in plan.codes]
    verify(plan)
    plain.check(plan.graph, plan.schedule, actions)


def tampered(codes, count, random):
    """The codes with one small change."""
    lines = [line.copy() for line in codes]
    rank = int(random.integers(len(lines)))
    line = lines[rank]
    i, j = (int(x) for x in random.integers(0, len(line), 2))
    change = int(random.integers(5))
    if change == 0:
        line[[i, j]] = line[[j, i]]
    elif change == 1:
        line = np.delete(line, i)
    elif change == 2:
        line = np.insert(line, j, line[i])
    elif change == 3:
        line = np.insert(np.delete(line, i), min(j, len(line) - 1), line[i])
    else:
        line[i] = random.integers(count)
    lines[rank] = line
    return tuple(lines)


@settings(max_examples=400, deadline=None)
@given(small_graphs(), st.integers(0, 2**32 - 1))
def test_accepts_and_refuses_like_plain_python(graph, seed):
    plan = drawn_plan(graph, seed)
    random = np.random.default_rng(seed)
    codes = tampered(plan.codes, code_count(plan.graph), random)
    try:
        plain.check(plan.graph, plan.schedule, tuple(RankActions(plan.graph, codes)))
        fault = None
    except PlanError as error:
        fault = error
    changed = replace(plan, codes=codes)
    if fault is None:
        verify(changed)
    else:
        with pytest.raises(PlanError, match=r"rank|channel"):
            verify(changed)


def test_refuses_what_is_no_code():
    plan = drawn_plan(random_graph(1), 0)
    codes = (np.append(plan.codes[0], code_count(plan.graph)).astype(np.int32), *plan.codes[1:])
    with pytest.raises(PlanError, match=r"rank 0, action \d+: \d+ is not the code of an action"):
        verify(replace(plan, codes=codes))


@settings(max_examples=20, deadline=None)
@given(small_graphs(), st.integers(0, 2**32 - 1))
def test_travels_and_keeps_its_hash(graph, seed):
    plan = drawn_plan(graph, seed)
    tuple(plan.actions)  # decoded actions don't travel
    data = pickle.dumps(plan)
    back = pickle.loads(data)
    assert b"RankActions" not in data
    assert back.digest() == plan.digest()
    assert back.actions == plan.actions
    swapped = (plan.codes[0][::-1].copy(), *plan.codes[1:])
    assert replace(plan, codes=swapped).digest() != plan.digest()
