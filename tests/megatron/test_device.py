"""A GPU is priced as what it is, and never filled beyond what it has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dip_megatron import load_cluster
from dip_megatron.megatron.device import cluster_here


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    def be(name: str, gigabytes: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        device = SimpleNamespace(name=name, total_memory=int(gigabytes * 1e9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)

    return be


@pytest.mark.parametrize(
    ("name", "gigabytes", "cluster"),
    [
        ("NVIDIA H100 80GB HBM3", 85.5, "h100"), ("NVIDIA H200", 150.7, "h200"), ("NVIDIA B200", 191.5, "b200"),
        ("NVIDIA H20", 102.0, "h20"), ("NVIDIA H800", 85.5, "h800"),
    ],
)  # fmt: skip
def test_a_gpu_that_ships_is_known_by_its_name(gpu, name: str, gigabytes: float, cluster: str) -> None:
    gpu(name, gigabytes)
    told: list[str] = []
    assert cluster_here(told.append) == load_cluster(cluster)
    assert not told


@pytest.mark.parametrize(
    ("name", "gigabytes", "usable"), [("NVIDIA A100-SXM4-40GB", 42.4, 38.4), ("NVIDIA GH200 480GB", 102.0, 76.0)]
)
def test_another_gpu_is_an_h100_within_its_own_memory(gpu, name: str, gigabytes: float, usable: float) -> None:
    gpu(name, gigabytes)
    told: list[str] = []
    found = cluster_here(told.append)
    assert found.flops == load_cluster("h100").flops
    assert found.usable_bytes == pytest.approx(usable * 1e9)
    assert len(told) == 1
    assert told[0].startswith(f"{name}: its rates aren't known here")
    assert f"{usable:.0f} GB" in told[0]


def test_less_memory_than_published_is_what_counts(gpu) -> None:
    gpu("NVIDIA H100 MIG 3g.40gb", 42.0)
    assert cluster_here().usable_bytes == pytest.approx(38e9)


def test_ranks_without_a_gpu_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cluster_here() == load_cluster("cpu")
