"""What a run is planned for: its device, and whose published rates count where settings leave that to the device."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch

from ..describe.cost import Cluster, load_cluster
from ..describe.files import shipped

_OTHERWISE = "h100"


def device_name() -> str:
    """What ranks compute on here, as files of measured costs name it: the GPU's name, or ``cpu``."""
    if not torch.cuda.is_available():
        return "cpu"
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).name)


def cluster_here(tell: Callable[[str], object] = lambda _: None) -> Cluster:
    """The shipped cluster of this process's GPU, by its name, or the one of CPU ranks where there is none.

    A GPU that no shipped cluster is made of is priced as an H100, which ``tell`` is told. A rank may never use more
    than the GPU has.
    """
    if not torch.cuda.is_available():
        return load_cluster("cpu")
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    words = re.split(r"[^a-z0-9]+", device.name.lower())
    known = next((name for name in shipped("clusters") if name in words), None)
    found = load_cluster(known or _OTHERWISE)
    found = replace(found, memory_bytes=min(found.memory_bytes, float(device.total_memory)))
    if known is None:
        tell(
            f"{device.name}: its rates aren't known here; it is priced as an {_OTHERWISE.upper()}, and plans use at "
            f"most {found.usable_bytes / 1e9:.0f} GB of it. `cluster: FILE` (as dip_megatron/configs/clusters has) "
            "says better, `costs:` of `dip profile` best"
        )
    return found
