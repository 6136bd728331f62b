"""The families of Megatron-Bridge's models. Importing it imports that: its adapter does, once Bridge is there."""

from __future__ import annotations

from .family import family_of
from .gemma3_vl import Gemma3Vl
from .glm45_vl import Glm45Vl
from .kimi_k25_vl import KimiK25Vl
from .ministral3_vl import Ministral3Vl
from .qwen3_omni import Qwen3Omni
from .qwen3_vl import Qwen3Vl
from .qwen25_omni import Qwen25Omni
from .qwen25_vl import Qwen25Vl

_PAGES = (Qwen25Vl(), Qwen3Vl(), Gemma3Vl(), Glm45Vl(), Ministral3Vl(), Qwen25Omni(), Qwen3Omni(), KimiK25Vl())
BRIDGE_FAMILIES = tuple(family_of(page) for page in _PAGES)
"""Each has the class that one of Bridge's providers builds."""
