"""The schedules DIP is measured against, as plans through the same simulator and verifier."""

from .common import BaselineError
from .fit import Fitted, least_recompute
from .mean import mean_graph
from .megatron import interleaved, legal_group, one_forward_one_backward
from .optimus import optimus_coarse, optimus_leads
from .segmented import segmented_static
from .zero_bubble import zb_h1, zb_v

__all__ = [
    "BaselineError",
    "Fitted",
    "interleaved",
    "least_recompute",
    "legal_group",
    "mean_graph",
    "one_forward_one_backward",
    "optimus_coarse",
    "optimus_leads",
    "segmented_static",
    "zb_h1",
    "zb_v",
]
