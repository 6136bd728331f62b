"""Tiny models of the families that ROLL's ``mcore_adapter`` has classes of its own for."""

from __future__ import annotations

from typing import Any

from tests.bridge.tiny import qwen3, qwen3_moe, qwen25
from tests.bridge.tiny_mcore import QWEN3, Positioned, Published
from tests.bridge.tiny_model import Content, Tiny


class Logits(Tiny):
    """Whose class gives the loop logits."""

    def arguments(self, shown: tuple[Content, ...], seed: int) -> dict[str, Any]:
        found = super().arguments(shown, seed)
        return found | {"targets": found["labels"], "labels": None, "force_vit_image": True}


class Placed(Logits, Positioned):
    """To which the loop gives positions as Hugging Face's model has them."""


class Everywhere(Logits):
    """Whose class works out positions by itself: Qwen2.5-VL's has others than Hugging Face's for videos."""

    def arguments(self, shown: tuple[Content, ...], seed: int) -> dict[str, Any]:
        return super().arguments(shown, seed) | {"position_ids": None}


class PublishedEverywhere(Everywhere, Published):
    """With experts' matrices in the folder as published."""


ROLL_TINY = {
    tiny.name: tiny
    for tiny in (
        Placed("roll-qwen2-5-vl", qwen25, pixels_everywhere=True),
        Everywhere("roll-qwen2-5-vl-tied", qwen25, pixels_everywhere=True, tied=True),
        Everywhere("roll-qwen3-vl", qwen3, pixels_everywhere=True, **QWEN3),
        PublishedEverywhere("roll-qwen3-vl-moe", qwen3_moe, pixels_everywhere=True, experts=True, **QWEN3),
    )
}
