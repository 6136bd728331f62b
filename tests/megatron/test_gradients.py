"""When gradients are reduced over replicas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch

from dip_megatron.core.lower import make_plan
from dip_megatron.megatron import gradients
from dip_megatron.schedulers.greedy import greedy
from tests.graphs import random_graph


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
def test_the_first_reductions_on_gpus_come_last(monkeypatch: Any, device: bool) -> None:
    """Where they connect replicas, nothing of the iteration may be left that another rank waits for."""
    started: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    chunks: list[torch.nn.Module] = [torch.nn.Identity(), torch.nn.Identity()]
    monkeypatch.setattr(gradients, "start_gradient_reduction", lambda chunk: started.append(chunks.index(chunk)))
    graph = random_graph(0)
    plan = make_plan(graph, greedy(graph), lower_bound=0.0)
    reduced: WeakSet[torch.nn.Module] = WeakSet()
    seen = []
    for _ in range(2):
        config = SimpleNamespace(no_sync_func=object())
        sync = gradients.GradientSynchronization(plan, chunks, config, [1, 0], reduced)
        sync.begin(set())
        sync.chunk_done(1)
        seen.append(list(started))
        sync.chunk_done(0)
        sync.end()
        assert started == [1, 0]
        started.clear()
    assert seen == [[] if device else [1], [1]]
