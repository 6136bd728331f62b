"""Which of Megatron's groups go to NCCL where ranks share a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from dip_megatron.megatron.shared_gpu import single_ranks_on_nccl


@pytest.fixture
def made(monkeypatch):
    """Backends of the groups that Megatron makes, by their ranks; with a GPU that is there by name alone."""
    groups = {}

    def create_group(ranks=None, timeout=None, backend=None, pg_options=None, **options):
        groups[tuple(ranks)] = backend

    monkeypatch.setattr(parallel_state, "create_group", create_group)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return groups


def make_some():
    parallel_state.create_group([0, 1, 2, 3], timeout=None, pg_options=None, group_desc="PIPELINE")
    parallel_state.create_group([2], timeout=None, pg_options=None, group_desc="DATA")
    parallel_state.create_group([3], timeout=None, backend="gloo", group_desc="DATA_GLOO")


def test_groups_of_one_rank(made):
    args = SimpleNamespace(distributed_backend="gloo")
    assert single_ranks_on_nccl(args)
    assert single_ranks_on_nccl(args)  # twice is once
    make_some()
    assert made == {(0, 1, 2, 3): None, (2,): "nccl", (3,): "gloo"}


@pytest.mark.parametrize(("backend", "gpu"), [("nccl", True), ("gloo", False)])
def test_nothing_changes_elsewhere(made, monkeypatch, backend, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert not single_ranks_on_nccl(SimpleNamespace(distributed_backend=backend))
    make_some()
    assert made == {(0, 1, 2, 3): None, (2,): None, (3,): "gloo"}
