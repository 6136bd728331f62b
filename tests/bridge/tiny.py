"""Tiny models of the families: :class:`.tiny_model.Tiny` of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.bridge.tiny_kimi import Patches, kimi, latent
from tests.bridge.tiny_model import (
    END,
    IDS,
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
from tests.bridge.tiny_omni import OMNI

QWEN3_STEP = "megatron.bridge.models.qwen_vl.qwen3_vl_step"


def qwen25(tied: bool) -> Any:
    import transformers

    text = TEXT | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": tied,
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1, 3], "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, dtype=torch.float32, **IDS,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_parts(tied: bool, **text: Any) -> dict[str, Any]:
    """Of a configuration of Qwen3-VL's, dense or with experts."""
    rotary = {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
    }  # fmt: skip
    language = {"head_dim": 16, "num_hidden_layers": 6, "tie_word_embeddings": tied, "rope_parameters": rotary}
    vision = {
        "depth": 5, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 3],
    }  # fmt: skip
    return {
        "text_config": TEXT | language | text, "vision_config": vision, "tie_word_embeddings": tied,
        "dtype": torch.float32, **IDS,
    }  # fmt: skip


def qwen3(tied: bool) -> Any:
    import transformers

    config = transformers.Qwen3VLConfig(**qwen3_parts(tied), architectures=["Qwen3VLForConditionalGeneration"])
    return transformers.Qwen3VLForConditionalGeneration(config)


def qwen3_moe(tied: bool) -> Any:
    import transformers

    parts = qwen3_parts(
        tied, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, router_aux_loss_coef=0.01
    )  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(**parts, architectures=["Qwen3VLMoeForConditionalGeneration"])
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def exact_gelu(model: Any) -> None:
    """Bridge gives patch mergers the tower's GELU, by the tangent; Hugging Face's have the exact one."""
    if model.vision_model is None:
        return
    for module in model.vision_model.modules():
        if type(module).__name__ == "Qwen3VLVisionPatchMerger":
            module.activation_func = torch.nn.functional.gelu


def qwen35_parts(tied: bool, **text: Any) -> dict[str, Any]:
    """Of a configuration of Qwen3.5's, dense or with experts."""
    language = {
        "head_dim": 32, "tie_word_embeddings": tied, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                            "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
    }  # fmt: skip
    return {
        "text_config": TEXT | language | text, "vision_config": vision, "tie_word_embeddings": tied,
        "dtype": torch.float32, **IDS,
    }  # fmt: skip


def qwen35(tied: bool, **text: Any) -> Any:
    import transformers

    config = transformers.Qwen3_5Config(
        **qwen35_parts(tied, **text), architectures=["Qwen3_5ForConditionalGeneration"]
    )  # fmt: skip
    return transformers.Qwen3_5ForConditionalGeneration(config)


def deterministic(provider: Any) -> None:
    """Gated delta nets by Megatron's own rule; one depth of multi-token prediction."""
    provider.mrope_section, provider.deterministic_mode = [4, 2, 2], True
    provider.cross_entropy_loss_fusion, provider.mtp_num_layers = False, 1


def qwen35_moe(tied: bool, **text: Any) -> Any:
    """Each layer with experts, and one that all tokens go through, behind a gate."""
    import transformers

    parts = qwen35_parts(
        tied, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=48,
        router_aux_loss_coef=0.01, **text,
    )  # fmt: skip
    config = transformers.Qwen3_5MoeConfig(**parts, architectures=["Qwen3_5MoeForConditionalGeneration"])
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


def deterministic_experts(provider: Any) -> None:
    """:func:`deterministic`, experts without fused kernels, and a loss for their balance that knows one microbatch."""
    plain_experts(4, 2, 2)(provider)
    deterministic(provider)
    provider.moe_router_load_balancing_type = "aux_loss"


class Predicting(Tiny):
    """With weights of multi-token prediction, which Hugging Face's model has not and its folder has."""

    def save(self, folder: Path) -> None:
        super().save(folder)
        weights = load_file(folder / "model.safetensors")
        layer, mlp = "mtp.layers.0", "mtp.layers.0.mlp"
        shapes = {
            "mtp.fc": (64, 128), "mtp.pre_fc_norm_embedding": (64,), "mtp.pre_fc_norm_hidden": (64,), "mtp.norm": (64,),
            f"{layer}.input_layernorm": (64,), f"{layer}.post_attention_layernorm": (64,),
            f"{layer}.self_attn.q_proj": (256, 64), f"{layer}.self_attn.k_proj": (64, 64),
            f"{layer}.self_attn.v_proj": (64, 64), f"{layer}.self_attn.o_proj": (64, 128),
            f"{layer}.self_attn.q_norm": (32,), f"{layer}.self_attn.k_norm": (32,),
        }  # fmt: skip
        widths = {mlp: 128}
        if self.experts:
            widths = {f"{mlp}.experts.{i}": 32 for i in range(4)} | {f"{mlp}.shared_expert": 48}
            shapes |= {f"{mlp}.gate": (4, 64), f"{mlp}.shared_expert_gate": (1, 64)}
        for part, width in widths.items():
            shapes |= {f"{part}.{name}_proj": (width, 64) for name in ("gate", "up")}
            shapes[f"{part}.down_proj"] = (64, width)
        generator = torch.Generator().manual_seed(9)
        for name, shape in shapes.items():
            weights[f"{name}.weight"] = 0.05 * torch.randn(shape, generator=generator)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})


def gemma3(tied: bool) -> Any:
    import transformers

    text = TEXT | {
        "num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": tied,
    }  # fmt: skip
    vision = {
        "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "image_size": 56,
        "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE,
        boi_token_index=START, eoi_token_index=END, tie_word_embeddings=tied, dtype=torch.float32,
        architectures=["Gemma3ForConditionalGeneration"],
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def small_pictures(provider: Any) -> None:
    """Bridge's projector keeps the size of the published models' pictures."""
    projector = provider.vision_projector_config
    projector.image_size, projector.patch_dim, projector.tokens_per_image = 56, 14, 4


def exact_norms(model: Any) -> None:
    """Bridge's norms behind linears have an epsilon of 1e-5, not the model's."""
    for name, module in model.named_modules():
        if name.endswith("post_layernorm") and name.startswith("language_model"):
            module.eps = 1e-6


class Pictures(Tiny):
    """Of pictures of one size, 56 x 56 pixels, that become four tokens each."""

    def seen(self, shown: tuple[Content, ...], generator: torch.Generator) -> dict[str, Any]:
        if not shown:
            return {}
        return {"pixel_values": torch.randn(len(shown), 3, 56, 56, generator=generator)}

    def hugging_face(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"token_type_ids": (arguments["input_ids"] == IMAGE).int()}


def ministral3(tied: bool) -> Any:
    import transformers

    text = TEXT | {
        "head_dim": 16, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5, "model_type": "ministral3",
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
            "truncate": False,  # as Bridge has it
        },
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64,
        "num_attention_heads": 2, "head_dim": 16, "image_size": 224, "patch_size": 14,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=IMAGE, spatial_merge_size=2, dtype=torch.float32,
        tie_word_embeddings=tied, architectures=["Mistral3ForConditionalGeneration"],
    )  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(config)


class Padded(Pictures):
    """Of pictures of any size, padded to the largest."""

    def seen(self, shown: tuple[Content, ...], generator: torch.Generator) -> dict[str, Any]:
        if not shown:
            return {}
        sizes = torch.tensor([[self.patch * side for side in grid[1:]] for _, grid in shown])
        pixels = torch.randn(len(shown), 3, *sizes.amax(dim=0).tolist(), generator=generator)
        return {"pixel_values": pixels, "image_sizes": sizes}

    def hugging_face(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {}


def glm_parts(tied: bool, **text: Any) -> dict[str, Any]:
    """Of a configuration of GLM-4.1V's or GLM-4.5V's."""
    language = {
        "head_dim": 16, "tie_word_embeddings": tied, "attention_bias": True,
        "image_start_token_id": START, "image_end_token_id": END, "image_token_id": IMAGE, "video_token_id": VIDEO,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                            "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "image_size": 112,
    }  # fmt: skip
    return {
        "text_config": TEXT | language | text, "vision_config": vision, "tie_word_embeddings": tied,
        "dtype": torch.float32, "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START,
        "image_end_token_id": END,
    }  # fmt: skip


def glm45(tied: bool) -> Any:
    import transformers

    parts = glm_parts(
        tied, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        use_qk_norm=False,
    )  # fmt: skip
    config = transformers.Glm4vMoeConfig(**parts, architectures=["Glm4vMoeForConditionalGeneration"])
    return transformers.Glm4vMoeForConditionalGeneration(config)


class OneToken(Tiny):
    """With one token for images and videos, of which a microbatch therefore holds either."""

    def contents(self, seed: int, microbatches: int) -> list[tuple[Content, ...]]:
        found = super().contents(seed, microbatches)
        return [tuple((kind, grid) for kind, grid in line if kind == line[-1][0]) for line in found]

    def tokens(self, kind: str, grid: Grid) -> list[int]:
        return [IMAGE if token == VIDEO else token for token in super().tokens(kind, grid)]

    def arguments(self, shown: tuple[Content, ...], seed: int) -> dict[str, Any]:
        found = super().arguments(shown, seed)
        kind = 2 if shown and shown[0][0] == "video" else 1
        return found | {"mm_token_type_ids": kind * (found["input_ids"] == IMAGE).int()}

    def hugging_face(self, arguments: dict[str, Any]) -> dict[str, Any]:
        kind = 2 if "video_grid_thw" in arguments else 1
        return {"mm_token_type_ids": kind * (arguments["input_ids"] == IMAGE).int()}


TINY = {
    tiny.name: tiny
    for tiny in (
        Tiny("qwen2-5-vl", qwen25, change=sections(2, 3, 3)),
        Tiny("qwen2-5-vl-tied", qwen25, tied=True, change=sections(2, 3, 3)),
        Tiny(
            "qwen3-vl", qwen3, patch=16, split_frames=True, vision_layers=5, language_layers=6,
            change=sections(4, 2, 2), logits=exact_gelu, step=QWEN3_STEP,
        ),
        Predicting(
            "qwen3-5-vl", qwen35, patch=16, split_frames=True, change=deterministic, logits=exact_gelu, step=QWEN3_STEP,
        ),
        Predicting(
            "qwen3-5-vl-moe", qwen35_moe, patch=16, split_frames=True, change=deterministic_experts, logits=exact_gelu,
            step=QWEN3_STEP, experts=True,
        ),
        Pictures(
            "gemma3-vl", gemma3, change=small_pictures, logits=exact_norms, tied=True, videos=False, language_layers=6,
            sizes=((1, 4, 4),),
        ),
        # A picture of one token alone in its microbatch ends in Hugging Face's code.
        Padded("ministral3-vl", ministral3, videos=False, sizes=((1, 4, 4), (1, 4, 8), (1, 8, 12))),
        Tiny(
            "qwen3-vl-moe", qwen3_moe, patch=16, split_frames=True, vision_layers=5, language_layers=6,
            change=plain_experts(4, 2, 2), logits=exact_gelu, step=QWEN3_STEP, experts=True,
        ),
        Patches("kimi-k2-5", kimi, temporal=1, videos=False, change=latent, experts=True),
        OneToken("glm-4-5v", glm45, split_frames=True, change=plain_experts(2, 1, 1), experts=True),
        *OMNI,
    )
}  # fmt: skip
