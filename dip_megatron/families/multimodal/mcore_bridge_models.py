"""The families of mcore-bridge's models. Importing it imports that: the adapter of ms-swift does, once it is there."""

from __future__ import annotations

from .mcore_bridge import families_of
from .mcore_glm import McoreBridgeGlm
from .mcore_internvl import McoreBridgeInternVl, McoreBridgeInternVlChat
from .mcore_kimi_vl import McoreBridgeKimiVl
from .mcore_qwen3_5 import McoreBridgeQwen35
from .mcore_qwen3_vl import McoreBridgeQwen3Vl
from .mcore_qwen_vl import McoreBridgeQwen2Vl, McoreBridgeQwen25Vl

MCORE_BRIDGE_FAMILIES = families_of(
    (
        McoreBridgeQwen25Vl(),
        McoreBridgeQwen2Vl(),
        McoreBridgeQwen3Vl(),
        McoreBridgeQwen35(),
        McoreBridgeGlm(),
        McoreBridgeInternVl(),
        McoreBridgeInternVlChat(),
        McoreBridgeKimiVl(),
    )
)
"""They share the class that all of mcore-bridge's multimodal models have."""
