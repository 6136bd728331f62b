"""Plans for replicas that expert parallelism couples: pairing, and the search over all of them at once."""

from .engine import JointFound, one_slot_at_a_time, search_joint
from .pairing import Slots, as_they_come, dip_pairing, pairings
from .together import Together, together

__all__ = [
    "JointFound",
    "Slots",
    "Together",
    "as_they_come",
    "dip_pairing",
    "one_slot_at_a_time",
    "pairings",
    "search_joint",
    "together",
]
