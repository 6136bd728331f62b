"""Tiny models of the families that ROLL's ``mcore_adapter`` has classes of its own for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from tests.bridge.tiny import qwen3, qwen3_moe, qwen25
from tests.bridge.tiny_mcore import QWEN3, Positioned, Published, qwen2_vl
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
        Everywhere("roll-qwen2-vl", qwen2_vl, pixels_everywhere=True),
        Placed("roll-qwen2-5-vl", qwen25, pixels_everywhere=True),
        Everywhere("roll-qwen2-5-vl-tied", qwen25, pixels_everywhere=True, tied=True),
        Everywhere("roll-qwen3-vl", qwen3, pixels_everywhere=True, **QWEN3),
        PublishedEverywhere("roll-qwen3-vl-moe", qwen3_moe, pixels_everywhere=True, experts=True, **QWEN3),
    )
}


def packed_rows(samples: Sequence[dict[str, Any]], cut: Sequence[int] = (3, 10), multiple: int = 8) -> dict[str, Any]:
    """Samples as ROLL's loop gives them to a class that packs them itself: a row each, without so many of their last
    tokens, and where each is to stand in the one row, padded."""
    from megatron.core.packed_seq_params import PackedSeqParams

    ids = torch.cat([sample["input_ids"] for sample in samples])
    lengths = [ids.shape[1] - left for left in cut]
    ends = [0, *accumulate(-(-length // multiple) * multiple for length in lengths)]
    mask = (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    row = {"targets": torch.zeros(1, ends[-1], dtype=torch.long), "loss_mask": torch.zeros(1, ends[-1])}
    for sample, length, start in zip(samples, lengths, ends, strict=False):
        for name, values in row.items():
            values[0, start : start + length] = sample[name][0, :length]
    bounds = torch.tensor(ends, dtype=torch.int32)
    longest = int(bounds.diff().max())
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds, max_seqlen_q=longest, max_seqlen_kv=longest,
    )  # fmt: skip
    shown = {name for sample in samples for name in sample if name.startswith(("pixel", "image_", "video_"))}
    return {
        **row, "input_ids": ids * mask, "attention_mask": mask, "packed_seq_params": packed, "labels": None,
        "position_ids": None, "force_vit_image": True,
        **{name: torch.cat([sample[name] for sample in samples if name in sample]) for name in shown},
    }  # fmt: skip
