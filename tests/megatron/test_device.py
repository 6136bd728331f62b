"""A GPU is priced as what it is, and never filled beyond what it has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dip_megatron import load_cluster
from dip_megatron.config import DipConfig
from dip_megatron.describe.cost import Costs
from dip_megatron.megatron.chunks import costs_of
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


@pytest.mark.parametrize(
    ("measured_on", "told"),
    [
        ("NVIDIA H200", None), ("", None), ("cuda:0", None),
        ("cpu", "measured on cpu, while ranks compute on NVIDIA H200; the partition and the first plans go by it"),
        ("NVIDIA H20", "measured on NVIDIA H20, while ranks compute on NVIDIA H200"),
    ],
)  # fmt: skip
def test_costs_measured_elsewhere_are_told(gpu, tmp_path: Path, measured_on: str, told: str | None) -> None:
    gpu("NVIDIA H200", 150.7)
    path = tmp_path / "costs.json"
    Costs(transfer_seconds=1.0, device=measured_on).save(path)
    said: list[str] = []
    assert costs_of(DipConfig(schedule="dynamic", costs=path), said.append) == Costs.load(path)
    assert len(said) == (told is not None)
    assert told is None or told in said[0]


def test_without_a_file_of_costs_nothing_is_measured() -> None:
    assert costs_of(DipConfig(schedule="dynamic"), pytest.fail) is None
