"""What stages cost: seconds and bytes from an operator model, calibrated by measurements where there are any."""

from .calibration import Costs, Scale, Table
from .chunks import Chunk, ChunkCost, CostModel, LayerRun
from .corrections import Corrections, Line
from .graph import build_graph, build_mixed_graph, cost_model, mixed_graph, segmented_graph
from .hardware import Cluster, load_cluster
from .operators import Operators
from .parts import LayerCost, PartCost
from .sizes import Sizes, unit_sizes, whole_sizes
from .static import StaticBytes

__all__ = [
    "Chunk",
    "ChunkCost",
    "Cluster",
    "Corrections",
    "CostModel",
    "Costs",
    "LayerCost",
    "LayerRun",
    "Line",
    "Operators",
    "PartCost",
    "Scale",
    "Sizes",
    "StaticBytes",
    "Table",
    "build_graph",
    "build_mixed_graph",
    "cost_model",
    "load_cluster",
    "mixed_graph",
    "segmented_graph",
    "unit_sizes",
    "whole_sizes",
]
