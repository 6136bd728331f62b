"""Tiny models of families that come through mcore-bridge alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.bridge.tiny import Pictures, Predicting, glm45, glm_parts, qwen3, qwen3_moe, qwen35, qwen35_moe
from tests.bridge.tiny_kimi import FlatPatches, kimi_vl, no_query_norm
from tests.bridge.tiny_model import IDS, IMAGE, TEXT, VOCABULARY, Content, Tiny


def internvl(tied: bool, **text: Any) -> Any:
    """As InternVL3.5's large models: Qwen3, and an InternViT that normalises queries and keys."""
    import transformers

    text = TEXT | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": tied} | text
    vision = {
        "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 56,
        "patch_size": 14, "use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": True,
    }  # fmt: skip
    config = transformers.InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=4, dtype=torch.float32,
        tie_word_embeddings=tied, architectures=["InternVLForConditionalGeneration"],
    )  # fmt: skip
    return transformers.InternVLForConditionalGeneration(config)


def internvl_chat(tied: bool) -> Any:
    """In the layout of its own, as InternVL3's small models: Qwen2 behind InternViT with layer norms."""
    from tests.bridge.internvl_chat.configuration_internvl_chat import InternVLChatConfig
    from tests.bridge.internvl_chat.modeling_internvl_chat import InternVLChatModel

    vision = {
        "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 56,
        "patch_size": 14, "qk_normalization": False, "norm_type": "layer_norm", "qkv_bias": True,
        "initializer_factor": 1.0,
    }  # fmt: skip
    InternVLChatConfig.register_for_auto_class()
    InternVLChatModel.register_for_auto_class("AutoModelForCausalLM")
    config = InternVLChatConfig(
        llm_config=TEXT | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": tied},
        vision_config=vision, tie_word_embeddings=tied, dtype=torch.float32, architectures=["InternVLChatModel"],
    )  # fmt: skip
    model = InternVLChatModel(config)
    model.img_context_token_id = IMAGE
    return model


def internvl_moe(tied: bool) -> Any:
    return internvl(
        tied, model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
    )  # fmt: skip


def qwen2_vl(tied: bool) -> Any:
    import transformers

    text = TEXT | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": tied,
    }  # fmt: skip
    vision = {
        "depth": 4, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, dtype=torch.float32, **IDS,
        architectures=["Qwen2VLForConditionalGeneration"],
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


ROTATED = {"partial_rotary_factor": 0.5}
"""Which mcore-bridge reads before that of the rotary embeddings' parameters; Hugging Face's class writes 0.25."""


def qwen35_dense(tied: bool) -> Any:
    return qwen35(tied, **ROTATED)


def qwen35_experts(tied: bool) -> Any:
    return qwen35_moe(tied, **ROTATED)


def glm41(tied: bool) -> Any:
    import transformers

    config = transformers.Glm4vConfig(**glm_parts(tied), architectures=["Glm4vForConditionalGeneration"])
    return transformers.Glm4vForConditionalGeneration(config)


class Positioned(Tiny):
    """With positions in three directions, which loops ask Hugging Face's model for."""

    def arguments(self, shown: tuple[Content, ...], seed: int) -> dict[str, Any]:
        found = super().arguments(shown, seed)
        kinds = self.hugging_face(found)["mm_token_type_ids"]
        grids = [found.get(f"{kind}_grid_thw") for kind in ("image", "video")]
        positions, _ = _made(self).model.get_rope_index(found["input_ids"], kinds, *grids)
        return found | {"position_ids": positions}


@cache
def _made(tiny: Tiny) -> Any:
    return tiny.made()


class PositionedPredicting(Positioned, Predicting):
    """Which predicts several tokens."""


class TwoMatrices(Positioned):
    """Whose MLPs mcore-bridge exports with a matrix of its own for the gate, where the folder has one for both."""

    def exported(self, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, weight in saved.items():
            names = [name.replace("gate_up", part) for part in ("gate", "up")] if ".gate_up_proj." in name else [name]
            found.update(zip(names, weight.chunk(len(names)), strict=True))
        return found


class Published(Positioned):
    """With experts' matrices in the folder as published: input by output, where Hugging Face's model writes new ones
    the other way around."""

    def save(self, folder: Path) -> None:
        super().save(folder)
        file = folder / "model.safetensors"
        turned = {
            name: weight.transpose(1, 2).contiguous() if "mlp.experts." in name else weight
            for name, weight in load_file(file).items()
        }
        save_file(turned, file, {"format": "pt"})


class Tiles(Pictures):
    """Of tiles of one size, which Hugging Face's model finds by their tokens."""

    def hugging_face(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {}


class OwnTiles(Tiles):
    """Whose folder has a tokenizer, which alone knows the token of tiles."""

    def save(self, folder: Path) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        super().save(folder)
        words = {"<IMG_CONTEXT>" if i == IMAGE else f"word{i}": i for i in range(VOCABULARY)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0")))
        tokenizer.add_special_tokens({"additional_special_tokens": ["<IMG_CONTEXT>"]})
        tokenizer.save_pretrained(folder)


QWEN3: dict[str, Any] = {"patch": 16, "split_frames": True, "vision_layers": 5, "language_layers": 6}
MCORE_TINY = {
    tiny.name: tiny
    for tiny in (
        Tiles("internvl", internvl, videos=False, sizes=((1, 4, 4),)),
        Tiles("internvl-tied", internvl, videos=False, sizes=((1, 4, 4),), tied=True),
        OwnTiles("internvl-chat", internvl_chat, videos=False, sizes=((1, 4, 4),)),
        Positioned("qwen2-vl", qwen2_vl),
        FlatPatches("kimi-vl", kimi_vl, temporal=1, videos=False, experts=True, logits=no_query_norm),
        Positioned("mcore-qwen3-vl", qwen3, **QWEN3),
        Published("mcore-qwen3-vl-moe", qwen3_moe, experts=True, **QWEN3),
        TwoMatrices("mcore-glm-4-1v", glm41, videos=False),
        Positioned("mcore-glm-4-5v", glm45, videos=False, experts=True),
        Positioned("mcore-qwen3-5", qwen35_dense, patch=16, split_frames=True),
        Positioned("mcore-qwen3-5-moe", qwen35_experts, patch=16, split_frames=True, experts=True),
        PositionedPredicting("mcore-qwen3-5-mtp", qwen35_dense, patch=16, split_frames=True, predicts=1),
        PositionedPredicting(
            "mcore-qwen3-5-moe-mtp", qwen35_experts, patch=16, split_frames=True, experts=True, predicts=1
        ),
        Tiles("internvl-moe", internvl_moe, videos=False, sizes=((1, 4, 4),), experts=True),
    )
}
