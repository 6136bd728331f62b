"""Efficiency curves of single operators: how much of the cluster's published rates this device reaches, by size.

They serve any model, with any tensor-parallel size: operators are measured at the shapes that one rank computes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from ..describe.cost import Cluster, Costs
from ..describe.model import ModuleShape, MultimodalModel
from ..megatron.device import device_name
from .timing import measure

Point = tuple[float, float]
"""(size, efficiency); the size is FLOPs for matmul and attention, bytes for memory."""

_MOST_BYTES = 2 << 30


def profile_operators(
    model: MultimodalModel,
    cluster: Cluster,
    device: torch.device,
    *,
    tokens: Sequence[int] = (),
    repeats: int = 5,
    progress: Callable[[str], None] = lambda _: None,
) -> Costs:
    """Measure matmuls, attention and memory traffic at the model's shapes, for units of the given ``tokens`` (none: a
    range that suits the device)."""
    dtype = torch.bfloat16 if cluster.element_bytes == 2 else torch.float32
    on_gpu = device.type == "cuda"
    tokens = tokens or ((256, 1024, 4096, 16384) if on_gpu else (64, 256, 1024))
    points: dict[str, list[Point]] = defaultdict(list)
    for shape in model.modules:
        tp = model.parallel.tp if shape.tensor_parallel == "split" else 1
        progress(f"{shape.name}: matmuls")
        for rows, inner, columns in matmul_shapes(shape, tp, tokens):
            if cluster.element_bytes * (rows * inner + inner * columns + rows * columns) < _MOST_BYTES:
                points["matmul"].append(_matmul(rows, inner, columns, cluster, device, dtype, repeats))
        progress(f"{shape.name}: attention")
        for length in attention_lengths(shape, model, tokens):
            forward, backward = _attention(shape, length, tp, cluster, device, dtype, repeats)
            points["attention"].append(forward)
            points["attention_backward"].append(backward)
    progress("memory")
    points["memory"] = [_copy(size, cluster, device, repeats) for size in (10**6, 10**7, 10**8)]
    curves = tuple(sorted((operator, curve_of(line)) for operator, line in points.items()))
    return Costs(efficiency=curves, device=device_name())  # type: ignore[arg-type]


def matmul_shapes(shape: ModuleShape, tp: int, tokens: Iterable[int]) -> set[tuple[int, int, int]]:
    """(rows, inner, columns) of a layer's linears on one tensor-parallel rank."""
    layer = shape.layer
    fc1 = layer.ffn // tp * (2 if layer.gated else 1)
    qkv = (layer.query_width + 2 * layer.kv_width) // tp
    pairs = [(layer.hidden, qkv), (layer.query_width // tp, layer.hidden), (layer.hidden, fc1)]
    pairs.append((layer.ffn // tp, layer.hidden))
    return {(rows, inner, columns) for rows in tokens for inner, columns in pairs}


def attention_lengths(shape: ModuleShape, model: MultimodalModel, tokens: Iterable[int]) -> list[int]:
    """Sequence lengths to measure: an image's patches for an encoder, the units' sizes for the others."""
    if shape.input == "images":
        return [model.packing.image_tokens * shape.reduction]
    longest = model.packing.max_tokens if shape.input == "text" else max(tokens)
    return sorted({min(t, longest) for t in tokens})


def curve_of(points: Sequence[Point]) -> tuple[Point, ...]:
    """One point per power of four of the size: its geometric mean size and its median efficiency, in (0, 1.2]."""
    groups: dict[int, list[Point]] = defaultdict(list)
    for size, efficiency in points:
        groups[round(math.log(size, 4))].append((size, efficiency))
    curve = []
    for _, group in sorted(groups.items()):
        size = float(np.exp(np.mean([math.log(s) for s, _ in group])))
        curve.append((size, float(np.clip(np.median([e for _, e in group]), 1e-4, 1.2))))
    return tuple(curve)


def _matmul(
    rows: int, inner: int, columns: int, cluster: Cluster, device: torch.device, dtype: torch.dtype, repeats: int
) -> Point:
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(columns, inner, device=device, dtype=dtype)
    times = 10 if device.type == "cuda" else 1

    def run() -> None:
        for _ in range(times):
            torch.nn.functional.linear(a, b)

    flops = 2.0 * rows * inner * columns
    return flops, flops * times / (measure([run], device, repeats=repeats)[0] * cluster.flops)


def _attention(
    shape: ModuleShape, length: int, tp: int, cluster: Cluster, device: torch.device, dtype: torch.dtype, repeats: int
) -> tuple[Point, Point]:
    heads, width = shape.layer.heads // tp, shape.layer.head_dim
    q, k, v = (torch.randn(1, heads, length, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(1, heads, length, width, device=device, dtype=dtype)
    output: list[torch.Tensor] = []

    def forward() -> None:
        causal = shape.layer.causal
        output[:] = [torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)]

    def backward() -> None:
        torch.autograd.grad(output[0], (q, k, v), gradient)

    seconds = measure([forward, backward], device, repeats=repeats)
    # As the cost model counts: 4 and 10 FLOPs per pair of tokens and channel, half of that if causal.
    pairs = float(length) ** 2 * (0.5 if shape.layer.causal else 1.0)
    sizes = 4 * pairs * heads * width, 10 * pairs * heads * width
    rates = [size / (t * cluster.flops) for size, t in zip(sizes, seconds, strict=True)]
    return (sizes[0], rates[0]), (sizes[1], rates[1])


def _copy(size: int, cluster: Cluster, device: torch.device, repeats: int) -> Point:
    source = torch.ones(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = 10 if device.type == "cuda" else 1

    def run() -> None:
        for _ in range(times):
            target.copy_(source)

    return float(size), size * times / (measure([run], device, repeats=repeats)[0] * cluster.memory_bandwidth)
