"""Batches as counts: microbatches, their instances and sub-microbatches, workload files, synthetic mixes."""

from .batch import Clip, GlobalBatch, Microbatch, WorkloadError
from .files import format_batch, parse_batch, read_workload, write_workload
from .mixes import image_bounds, load_workload
from .packing import Sample, pack_clips, pack_documents
from .replicas import place_units
from .shares import shares
from .units import even_slices, make_units, partition_units

__all__ = [
    "Clip",
    "GlobalBatch",
    "Microbatch",
    "Sample",
    "WorkloadError",
    "even_slices",
    "format_batch",
    "image_bounds",
    "load_workload",
    "make_units",
    "pack_clips",
    "pack_documents",
    "parse_batch",
    "partition_units",
    "place_units",
    "read_workload",
    "shares",
    "write_workload",
]
