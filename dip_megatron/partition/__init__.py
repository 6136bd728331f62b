"""How to cut a model: sub-microbatch sizes, segments, and layers to chunks."""

from ..model import ModulePartition, Partition, even_partition
from .choose import choose_partition, greedy_judge, paper_partition
from .files import read_partition, write_partition
from .layers import ModuleLoad, balance_layers, rank_loads
from .unit_size import UnitSize, efficient_unit_size

__all__ = [
    "ModuleLoad",
    "ModulePartition",
    "Partition",
    "UnitSize",
    "balance_layers",
    "choose_partition",
    "efficient_unit_size",
    "even_partition",
    "greedy_judge",
    "paper_partition",
    "rank_loads",
    "read_partition",
    "write_partition",
]
