"""The families of ROLL's models. Importing it imports ``mcore_adapter``: the adapter of ROLL does, once it is there."""

from __future__ import annotations

from .family import family_of
from .roll_qwen import RollQwen2Vl, RollQwen25Vl
from .roll_qwen3 import RollQwen3Vl

ROLL_FAMILIES = tuple(family_of(page) for page in (RollQwen2Vl(), RollQwen25Vl(), RollQwen3Vl()))
