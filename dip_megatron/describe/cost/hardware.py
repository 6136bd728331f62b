"""Clusters: what a GPU and its links can do, and how much of that the operators reach."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

from ...core.graph import Floats
from ..files import read_yaml, resolve

Operator = Literal["matmul", "attention", "attention_backward", "memory", "collective", "p2p", "host"]
Curve = tuple[tuple[float, float], ...]
"""Points (size, efficiency), sizes rising; the size of matmul and attention is FLOPs, of all others bytes."""


@dataclass(frozen=True)
class Cluster:
    """One kind of GPU and how many of them are wired together. Rates per GPU and direction: ``flops`` a second at the
    training precision, the bandwidths in bytes a second; ``latency`` seconds. ``reserved_bytes`` of a GPU's memory are
    lost to the driver, communicators and fragmentation. ``fused_attention``: attention never writes its score matrix.
    ``efficiency`` holds one curve per operator, 1/a_f, 1/a_m and 1/a_n of the paper's formula (section 3)."""

    name: str
    flops: float
    memory_bytes: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    gpus_per_node: int
    kernel_latency: float
    node_latency: float
    network_latency: float
    reserved_bytes: float
    element_bytes: int
    fused_attention: bool
    efficiency: tuple[tuple[Operator, Curve], ...]
    host_wait: float = 0.0
    """Seconds a GPU idles when the host must wait for what it has computed before it can launch what follows."""
    between_operations: float = 0.0
    """Seconds a rank takes from one operation to the next where it need not wait: messages, launching, bookkeeping."""
    ranks_on_cores: bool = False
    """Whether ranks compute on the host's cores, which planning then takes from them."""

    @property
    def usable_bytes(self) -> float:
        """What a rank may use in all: the memory less what is reserved."""
        return self.memory_bytes - self.reserved_bytes

    def curve(self, operator: Operator) -> Curve:
        """The operator's efficiency curve; (1, 1) where the cluster has none."""
        return self._curves.get(operator, ((1.0, 1.0),))

    @cached_property
    def _curves(self) -> dict[Operator, Curve]:
        return dict(self.efficiency)

    def with_efficiency(self, curves: dict[Operator, Curve]) -> Cluster:
        """The same cluster with some curves replaced (by measured ones)."""
        return replace(self, efficiency=tuple(sorted({**dict(self.efficiency), **curves}.items())))


def interpolate(curve: Curve, size: Floats) -> Floats:
    """Efficiency at ``size``: linear in log(size) between the points, constant beyond them."""
    xs, ys = _points(curve)
    out: Floats = np.interp(np.log(np.maximum(size, 1.0)), xs, ys)
    return out


@lru_cache(maxsize=256)
def _points(curve: Curve) -> tuple[Floats, Floats]:
    return np.log(np.array([p[0] for p in curve])), np.array([p[1] for p in curve])


class _Cluster(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    tflops: PositiveFloat
    memory_gb: PositiveFloat
    memory_gb_per_second: PositiveFloat
    node_gb_per_second: PositiveFloat
    network_gb_per_second: PositiveFloat
    host_gb_per_second: PositiveFloat
    gpus_per_node: PositiveInt
    kernel_microseconds: NonNegativeFloat
    node_microseconds: NonNegativeFloat
    network_microseconds: NonNegativeFloat
    reserved_gb: NonNegativeFloat
    host_wait_microseconds: NonNegativeFloat = 30
    between_microseconds: NonNegativeFloat = 0
    ranks_on_cores: bool = False
    element_bytes: Literal[2, 4] = 2
    fused_attention: bool = True
    efficiency: dict[Operator, Annotated[list[tuple[PositiveFloat, PositiveFloat]], Field(min_length=1)]] = Field(
        default_factory=dict
    )

    @field_validator("efficiency")
    @classmethod
    def _curves(cls, value: dict[Operator, list[tuple[float, float]]]) -> dict[Operator, list[tuple[float, float]]]:
        for name, points in value.items():
            check_curve(name, points)
        return value


def check_curve(name: str, points: list[tuple[float, float]]) -> Curve:
    """The points as a curve. Raises ValueError if sizes don't rise or an efficiency is above 1.2."""
    sizes = [p[0] for p in points]
    if any(b <= a for a, b in pairwise(sizes)):
        raise ValueError(f"{name}: sizes must rise, got {sizes}")
    if any(not 0 < p[1] <= 1.2 for p in points):
        raise ValueError(f"{name}: an efficiency must lie in (0, 1.2], got {[p[1] for p in points]}")
    return tuple((float(a), float(b)) for a, b in points)


def load_cluster(name_or_path: str | Path) -> Cluster:
    """A cluster by shipped name (``h100``) or from a YAML file. Raises ConfigurationError: file, place and reason."""
    data = read_yaml(resolve("clusters", name_or_path), _Cluster)
    return Cluster(
        name=data.name,
        flops=data.tflops * 1e12,
        memory_bytes=data.memory_gb * 1e9,
        memory_bandwidth=data.memory_gb_per_second * 1e9,
        node_bandwidth=data.node_gb_per_second * 1e9,
        network_bandwidth=data.network_gb_per_second * 1e9,
        host_bandwidth=data.host_gb_per_second * 1e9,
        gpus_per_node=data.gpus_per_node,
        kernel_latency=data.kernel_microseconds * 1e-6,
        node_latency=data.node_microseconds * 1e-6,
        network_latency=data.network_microseconds * 1e-6,
        reserved_bytes=data.reserved_gb * 1e9,
        element_bytes=data.element_bytes,
        fused_attention=data.fused_attention,
        host_wait=data.host_wait_microseconds * 1e-6,
        between_operations=data.between_microseconds * 1e-6,
        ranks_on_cores=data.ranks_on_cores,
        efficiency=tuple(sorted((k, check_curve(k, v)) for k, v in data.efficiency.items())),
    )
