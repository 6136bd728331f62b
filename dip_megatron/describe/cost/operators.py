"""Seconds of single operators: max(a_f*FLOPs/F, a_m*bytes/B_mem, a_n*bytes/B_net), section 3 of the paper.

The factors are one over an efficiency that depends on the operator and its size; a constant per launch comes on top.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...core.graph import Floats
from .hardware import Cluster, Operator, interpolate


@dataclass(frozen=True)
class Operators:
    """The operators of one tensor-parallel rank: sizes ``[U]`` in, seconds ``[U]`` out. Nothing to do takes no time. A
    stage has ``tp * cp`` neighbouring ranks."""

    cluster: Cluster
    tp: int
    cp: int = 1

    def _compute(self, operator: Operator, flops: Floats, moved: Floats) -> Floats:
        c = self.cluster
        work = flops / (c.flops * interpolate(c.curve(operator), flops))
        memory = moved / (c.memory_bandwidth * interpolate(c.curve("memory"), moved))
        return np.where(flops > 0, np.maximum(work, memory) + c.kernel_latency, 0.0)

    def matmul(self, rows: Floats, inner: float, columns: float, *, accumulate: bool = False) -> Floats:
        """``[rows, inner] x [inner, columns]``. ``accumulate``: it is a weight gradient, the product over ``rows``
        added to a float32 matrix ``[inner, columns]``."""
        element = self.cluster.element_bytes
        matrix = inner * columns * (8 if accumulate else element)
        return self._compute("matmul", 2 * rows * inner * columns, element * rows * (inner + columns) + matrix)

    def attention(self, pairs: Floats, tokens: Floats, width: float, kv_width: float, causal: bool) -> Floats:
        """Attention over sequences with ``pairs`` pairs of tokens in all, forward: two products, half of them skipped
        if causal, which only fused attention can."""
        share = 0.5 if causal and self.cluster.fused_attention else 1.0
        element = self.cluster.element_bytes
        return self._compute("attention", 4 * width * pairs * share, element * tokens * (2 * width + 2 * kv_width))

    def attention_backward(self, pairs: Floats, tokens: Floats, width: float, kv_width: float, causal: bool) -> Floats:
        """Its backward: five products with the recomputed scores (FlashAttention-2, section 3.1), four without."""
        fused = self.cluster.fused_attention
        share, products = (0.5 if causal and fused else 1.0), (5 if fused else 4)
        element = self.cluster.element_bytes
        moved = element * tokens * (4 * width + 4 * kv_width)
        return self._compute("attention_backward", 2 * products * width * pairs * share, moved)

    def delta_rule(
        self, tokens: Floats, heads: float, key_dim: int, value_dim: int, chunk: int, passes: float = 1.0
    ) -> Floats:
        """Gated delta rule in its chunkwise form (arXiv 2412.06464, section 3.3): a token and head takes three products
        with the state, and with the other tokens of its chunk three by key channels and two by value channels. Each
        chunk reads and writes its state in float32. ``passes``: how many times as much (a backward)."""
        flops = heads * (6 * key_dim * value_dim + 2 * chunk * (3 * key_dim + 2 * value_dim)) * tokens
        state = 8 * heads * key_dim * value_dim / chunk * tokens
        moved = self.cluster.element_bytes * heads * (2 * key_dim + 2 * value_dim) * tokens + state
        return self._compute("attention", passes * flops, passes * moved)

    def memory(self, moved: Floats) -> Floats:
        """An elementwise operator that reads and writes ``moved`` bytes in all."""
        c = self.cluster
        seconds = moved / (c.memory_bandwidth * interpolate(c.curve("memory"), moved)) + c.kernel_latency
        return np.where(moved > 0, seconds, 0.0)

    def grouped_matmul(
        self, rows: Floats, inner: float, columns: float, groups: float, *, accumulate: bool = False
    ) -> Floats:
        """:meth:`matmul` of ``rows`` rows, of which each of ``groups`` equal shares meets a matrix of its own. As
        efficient as one of the ``groups`` products is; all are launched together."""
        c, element = self.cluster, self.cluster.element_bytes
        flops = 2 * rows * inner * columns
        moved = element * rows * (inner + columns) + groups * inner * columns * (8 if accumulate else element)
        work = flops / (c.flops * interpolate(c.curve("matmul"), flops / groups))
        memory = moved / (c.memory_bandwidth * interpolate(c.curve("memory"), moved))
        return np.where(flops > 0, np.maximum(work, memory) + c.kernel_latency, 0.0)

    def exchange(self, size: Floats, ranks: int) -> Floats:
        """All-to-all among ``ranks`` neighbouring ranks, each of which sends ``size`` bytes in all, as much to itself
        as to any other. What leaves the node goes over the network while the rest goes within it."""
        if ranks == 1:
            return np.zeros_like(size)
        c = self.cluster
        near = min(ranks, c.gpus_per_node)
        efficiency = interpolate(c.curve("collective"), size)
        within = size * (near - 1) / ranks / (c.node_bandwidth * efficiency)
        beyond = size * (ranks - near) / ranks / (c.network_bandwidth * efficiency)
        latency = c.node_latency if ranks == near else c.network_latency
        return np.where(size > 0, np.maximum(within, beyond) + latency, 0.0)

    def gather(self, size: Floats, ranks: int | None = None, apart: int = 1) -> Floats:
        """All-gather, or reduce-scatter, of ``size`` bytes (of all ranks together) over so many ranks (None: the
        tensor-parallel ones), each the next but ``apart - 1``."""
        ranks = self.tp if ranks is None else ranks
        if ranks == 1:
            return np.zeros_like(size)
        c = self.cluster
        inside = ranks * apart <= c.gpus_per_node
        bandwidth = c.node_bandwidth if inside else c.network_bandwidth
        latency = c.node_latency if inside else c.network_latency
        moved = size * (ranks - 1) / ranks
        return np.where(size > 0, moved / (bandwidth * interpolate(c.curve("collective"), size)) + latency, 0.0)

    def all_reduce(self, size: Floats) -> Floats:
        """All-reduce of ``size`` bytes: a reduce-scatter and an all-gather."""
        return 2 * self.gather(size)

    def send(self, size: Floats, ranks: int) -> Floats:
        """``size`` bytes to the next of ``ranks`` pipeline ranks; over the network unless all of them share a node."""
        c = self.cluster
        if ranks == 1:
            return np.zeros_like(size)
        inside = self.tp * self.cp * ranks <= c.gpus_per_node
        bandwidth = c.node_bandwidth if inside else c.network_bandwidth
        latency = c.node_latency if inside else c.network_latency
        return size / (bandwidth * interpolate(c.curve("p2p"), size)) + latency

    def to_host(self, size: Floats) -> Floats:
        """Copying ``size`` bytes to host memory, or back."""
        return size / (self.cluster.host_bandwidth * interpolate(self.cluster.curve("host"), size))
