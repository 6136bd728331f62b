"""What stages cost: seconds and bytes from an operator model, calibrated by measurements where there are any."""

from ..model import LayerRun
from .calibration import Costs, Scale, Table
from .chunks import ChunkCost, CostModel
from .corrections import Corrections, Line
from .graph import build_graph, cost_model, priced_graph
from .hardware import Cluster, load_cluster
from .operators import Operators
from .parts import LayerCost, PartCost
from .sizes import Sizes, unit_sizes, whole_sizes
from .static import StaticBytes

__all__ = [
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
    "cost_model",
    "load_cluster",
    "priced_graph",
    "unit_sizes",
    "whole_sizes",
]
