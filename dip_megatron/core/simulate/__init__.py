"""Time and memory of a schedule."""

from .kernels import GraphArrays, graph_arrays, peak_memory, simulate_compiled
from .reference import DeadlockError, Timeline, idle_share, simulate

__all__ = [
    "DeadlockError",
    "GraphArrays",
    "Timeline",
    "graph_arrays",
    "idle_share",
    "peak_memory",
    "simulate",
    "simulate_compiled",
]
