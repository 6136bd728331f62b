"""Tiny omni models: pictures, videos and sound in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.bridge.tiny_model import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    END,
    IMAGE,
    START,
    TEXT,
    VIDEO,
    Content,
    Grid,
    Tiny,
    plain_experts,
    sections,
)

STEP = "megatron.bridge.models.qwen_omni.qwen3_omni_step"


def qwen25_omni(tied: bool) -> Any:
    import transformers

    vision = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
        "window_size": 56, "fullatt_block_indexes": [1, 3], "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    audio = {
        "num_mel_bins": 8, "encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "d_model": 24,
        "n_window": 4, "output_dim": 64, "max_source_positions": 64,
    }  # fmt: skip
    text = TEXT | {
        "tie_word_embeddings": tied, "rope_theta": 1000000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    thinker = {
        "vision_config": vision, "audio_config": audio, "text_config": text, "audio_token_index": AUDIO,
        "image_token_index": IMAGE, "video_token_index": VIDEO, "vision_start_token_id": START,
        "vision_end_token_id": END, "audio_start_token_id": AUDIO_START, "audio_end_token_id": AUDIO_END,
        "position_id_per_seconds": 25, "seconds_per_chunk": 2,
    }  # fmt: skip
    config = transformers.Qwen2_5OmniConfig(
        thinker_config=thinker, enable_audio_output=False, dtype=torch.float32,
        architectures=["Qwen2_5OmniForConditionalGeneration"],
    )  # fmt: skip
    return transformers.Qwen2_5OmniForConditionalGeneration(config)


def sectioned(model: Any) -> None:
    """Bridge interleaves the sections of M-RoPE as for Qwen3-VL; Hugging Face's model has them one after the other."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding

    language = getattr(model.thinker, "language_model", None)
    if language is not None:
        config = language.config
        language.rotary_pos_emb = MultimodalRotaryEmbedding(config.kv_channels, 1.0, rotary_base=config.rotary_base)


@dataclass(frozen=True)
class Sounding(Tiny):
    """With clips of sound of several lengths among the pictures, padded to ``longest_clip`` mel frames."""

    longest_clip: int = 24

    def contents(self, seed: int, microbatches: int) -> list[tuple[Content, ...]]:
        sound: list[tuple[Content, ...]] = [
            (), (("audio", (1, 1, 13)),), (), (("audio", (1, 1, 22)), ("audio", (1, 1, 9))), (("audio", (1, 1, 16)),),
        ]  # fmt: skip
        seen = super().contents(seed, microbatches)
        # Bridge puts videos behind images, wherever their tokens are.
        return [(*sorted(line[:3]), *sound[i % len(sound)]) for i, line in enumerate(seen)]

    def tokens(self, kind: str, grid: Grid) -> list[int]:
        if kind == "audio":
            return [AUDIO_START, *[AUDIO] * (((grid[2] - 1) // 2 - 1) // 2 + 1), AUDIO_END]
        return super().tokens(kind, grid)

    def arguments(self, shown: tuple[Content, ...], seed: int) -> dict[str, Any]:
        return super().arguments(shown, seed) | {"position_ids": None}

    def seen(self, shown: tuple[Content, ...], generator: torch.Generator) -> dict[str, Any]:
        found = super().seen(shown, generator)
        if "video_grid_thw" in found:
            found["video_second_per_grid"] = torch.ones(len(found["video_grid_thw"]))
        lengths = torch.tensor([grid[2] for kind, grid in shown if kind == "audio"])
        if len(lengths):
            mask = (torch.arange(self.longest_clip) < lengths[:, None]).long()
            found["input_features"] = torch.randn(len(lengths), 8, self.longest_clip, generator=generator)
            found["feature_attention_mask"] = mask
        return found

    def text(self, model: Any) -> Any:
        return model.thinker

    def hugging_face(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"attention_mask": torch.ones_like(arguments["input_ids"])}  # or positions are those of text


def qwen3_omni(tied: bool) -> Any:
    import transformers

    vision = {
        "depth": 5, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 3],
    }  # fmt: skip
    audio = {
        "num_mel_bins": 8, "encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "d_model": 24,
        "n_window": 50, "n_window_infer": 100, "output_dim": 64, "max_source_positions": 64,
        "downsample_hidden_size": 6,
    }  # fmt: skip
    text = TEXT | {
        "head_dim": 16, "num_hidden_layers": 6, "tie_word_embeddings": tied, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "router_aux_loss_coef": 0.01,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [4, 2, 2],
                            "mrope_interleaved": True},
    }  # fmt: skip
    thinker = {
        "vision_config": vision, "audio_config": audio, "text_config": text, "audio_token_id": AUDIO,
        "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
        "audio_start_token_id": AUDIO_START, "audio_end_token_id": AUDIO_END, "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
    }  # fmt: skip
    config = transformers.Qwen3OmniMoeConfig(
        thinker_config=thinker, enable_audio_output=False, dtype=torch.float32,
        architectures=["Qwen3OmniMoeForConditionalGeneration"],
    )  # fmt: skip
    return transformers.Qwen3OmniMoeForConditionalGeneration(config)


def without_dropout(provider: Any) -> None:
    """Bridge keeps Megatron's dropout of attention, which Hugging Face's model doesn't have."""
    plain_experts(4, 2, 2)(provider)
    provider.attention_dropout = 0.0


class OneClip(Sounding):
    """With a clip in some microbatches, since Bridge takes no more; videos among the images."""

    def contents(self, seed: int, microbatches: int) -> list[tuple[Content, ...]]:
        sound: list[tuple[Content, ...]] = [(), (("audio", (1, 1, 130)),), (), (("audio", (1, 1, 22)),)]
        seen = Tiny.contents(self, seed, microbatches)
        return [(*line[-2:], *sound[i % len(sound)]) for i, line in enumerate(seen)]

    def tokens(self, kind: str, grid: Grid) -> list[int]:
        if kind == "audio":
            seconds, rest = divmod(grid[2], 100)
            for _ in range(3):
                rest = (rest - 1) // 2 + 1
            return [AUDIO_START, *[AUDIO] * (13 * seconds + rest), AUDIO_END]
        return Tiny.tokens(self, kind, grid)


OMNI = (
    Sounding(
        "qwen2-5-omni", qwen25_omni, audio_layers=4, change=sections(2, 3, 3), logits=sectioned, step=STEP,
        step_shares=True,
    ),
    OneClip(
        "qwen3-omni", qwen3_omni, patch=16, vision_layers=5, language_layers=6, audio_layers=4,
        change=without_dropout, step=STEP, experts=True, longest_clip=144, pixels_everywhere=True,
        step_shares=True,
    ),
)  # fmt: skip
