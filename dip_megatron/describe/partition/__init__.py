"""How to cut a model: sub-microbatch sizes, segments, and layers to chunks."""

from ..model import ModulePartition, Partition, even_partition
from .files import read_partition, write_partition
from .layers import ModuleLoad, balance_layers, rank_loads
from .unit_size import UnitSize, efficient_unit_size

__all__ = [
    "ModuleLoad",
    "ModulePartition",
    "Partition",
    "UnitSize",
    "balance_layers",
    "efficient_unit_size",
    "even_partition",
    "rank_loads",
    "read_partition",
    "write_partition",
]
