"""The tiny Kimi-K2.5 and Kimi-VL, whose folders have code of their own (:mod:`.moonshot`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.bridge.tiny_model import IMAGE, TEXT, Content, Tiny, plain_experts

LATENT = TEXT | {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 32,
}  # fmt: skip
"""Latent attention, and experts behind a first layer without."""


def kimi(tied: bool) -> Any:
    from tests.bridge.moonshot.configuration_kimi_k25 import KimiK25Config
    from tests.bridge.moonshot.modeling_kimi_k25 import KimiK25ForConditionalGeneration

    text = LATENT | {
        "q_lora_rank": 24, "n_shared_experts": 1, "routed_scaling_factor": 2.827, "tie_word_embeddings": tied,
    }  # fmt: skip
    vision = {
        "init_pos_emb_height": 8, "init_pos_emb_width": 8, "vt_num_attention_heads": 2, "vt_num_hidden_layers": 4,
        "vt_hidden_size": 32, "vt_intermediate_size": 48, "mm_hidden_size": 32, "text_hidden_size": 64,
    }  # fmt: skip
    KimiK25Config.register_for_auto_class()
    KimiK25ForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")
    config = KimiK25Config(
        text_config=text, vision_config=vision, media_placeholder_token_id=IMAGE, pad_token_id=0, dtype=torch.float32,
        architectures=["KimiK25ForConditionalGeneration"],
    )  # fmt: skip
    return KimiK25ForConditionalGeneration(config)


def kimi_vl(tied: bool) -> Any:
    """Queries of no rank, two shared experts, another projector."""
    from tests.bridge.moonshot.configuration_kimi_vl import KimiVLConfig
    from tests.bridge.moonshot.modeling_kimi_vl import KimiVLForConditionalGeneration

    text = LATENT | {
        "q_lora_rank": None, "n_shared_experts": 2, "routed_scaling_factor": 2.446, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 800000.0},
    }  # fmt: skip
    vision = {
        "init_pos_emb_height": 8, "init_pos_emb_width": 8, "num_attention_heads": 2, "num_hidden_layers": 4,
        "hidden_size": 32, "intermediate_size": 48,
    }  # fmt: skip
    KimiVLConfig.register_for_auto_class()
    KimiVLForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")
    config = KimiVLConfig(
        text_config=text, vision_config=vision, media_placeholder_token_id=IMAGE, dtype=torch.float32,
        tie_word_embeddings=tied, architectures=["KimiVLForConditionalGeneration"],
    )  # fmt: skip
    model = KimiVLForConditionalGeneration(config)
    for name, buffer in model.named_buffers():  # experts' biases begin as zeros
        if name.endswith("correction_bias"):
            buffer += 0.1 * torch.randn(buffer.shape)
    return model


def no_query_norm(model: Any) -> None:
    """Megatron-Core has a norm before queries of no rank, whose weight comes from no file and goes into none; the
    folder's model has none there (https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/5261)."""
    for name, module in model.named_modules():
        if name.endswith("linear_q_proj"):
            module.forward = partial(_multiplied, module)


def _multiplied(linear: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
    return torch.nn.functional.linear(hidden, linear.weight), None


def latent(provider: Any) -> None:
    """Experts without what needs devices of its own or fused kernels."""
    plain_experts()(provider)
    provider.moe_token_dispatcher_type, provider.moe_flex_dispatcher_backend = "alltoall", None
    provider.cross_entropy_loss_fusion, provider.cross_entropy_fusion_impl = False, "native"
    provider.make_vocab_size_divisible_by = 128


class Patches(Tiny):
    """Of pictures of any size as a patch a row, with the code that reads them in the folder."""

    def seen(self, shown: tuple[Content, ...], generator: torch.Generator) -> dict[str, Any]:
        found = super().seen(shown, generator)
        if "pixel_values" in found:
            found["pixel_values"] = found["pixel_values"].view(-1, 3, self.patch, self.patch)
        return found

    def hugging_face(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {}


class FlatPatches(Patches):
    """Whose grids are of height and width alone."""

    def seen(self, shown: tuple[Content, ...], generator: torch.Generator) -> dict[str, Any]:
        found = super().seen(shown, generator)
        grids = found.pop("image_grid_thw", None)
        return found if grids is None else found | {"image_grid_hws": grids[:, 1:]}
