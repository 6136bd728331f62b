"""Megatron-Bridge from the inside, and the encoders that it takes from Hugging Face."""

from __future__ import annotations

import importlib
from typing import Any

from .names import Name, Topic

HOOKS = Topic(
    "hooks in Megatron-Bridge's loop",
    "megatron-bridge",
    "0.6.2",
    "Megatron-Bridge's pretrain() and finetune() can't run under DIP",
    (
        Name("megatron.bridge.training.pretrain:setup", ("state",)),
        Name("megatron.bridge.training.pretrain:_finish_train"),
        Name("megatron.bridge.training.setup:_update_model_config_funcs", ("model", "model_config")),
        Name("megatron.bridge.models.model_provider:_create_model", ("model_provider",)),
        Name("megatron.bridge.training.checkpointing:maybe_save_dataloader_state", ("model", "train_iterator")),
        Name("megatron.bridge.training.train:make_data_iterator_list", ("model", "data_iterator")),
        Name("megatron.bridge.training.eval:make_data_iterator_list", ("model", "data_iterator")),
    ),
)
CHECKPOINTS = Topic(
    "checkpoints of Megatron-Bridge's that go on with their partition",
    "megatron-bridge",
    "0.6.2",
    "no run of Megatron-Bridge's can go on from a checkpoint under DIP",
    (
        Name("megatron.bridge.training.checkpointing:checkpoint_exists", ("checkpoints_path",)),
        Name("megatron.bridge.training.checkpointing:_has_global_non_persistent_checkpoint", ("load_dir", "ckpt_cfg")),
        Name(
            "megatron.bridge.training.checkpointing:_load_base_checkpoint",
            ("load_dir", "ckpt_cfg", "*", "rank0", "pg_collection"),
        ),
        Name("megatron.bridge.training.checkpointing:generate_state_dict", ("ckpt_cfg", "model")),
    ),
)
TESTED = (0, 6)
"""The minor release that the tests cover."""
_VISION = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
_QWEN3 = "megatron.bridge.models.qwen_vl.modelling_qwen3_vl"
_SIGLIP = "transformers.models.siglip.modeling_siglip"
_PIXTRAL = "transformers.models.pixtral.modeling_pixtral"
_OMNI = "megatron.bridge.models.qwen_omni.modeling_qwen25_omni.thinker_model"
TOPIC = Topic(
    "Models of Megatron-Bridge in segments",
    "megatron-bridge",
    "0.6.2 with transformers 5.12.1",
    "some of Megatron-Bridge's models can't be trained under DIP",
    (
        Name(
            f"{_VISION}:Qwen2_5_VisionTransformerPretrainedModel",
            has=("patch_embed", "blocks", "merger"),
        ),
        Name(f"{_VISION}:Qwen2_5_VLVisionBlock", has=("attn", "mlp")),
        Name(
            f"{_SIGLIP}:SiglipVisionModel",
            has=("embeddings", "encoder", "post_layernorm"),
        ),
        Name(f"{_SIGLIP}:SiglipEncoderLayer", has=("self_attn", "mlp")),
        Name(
            "megatron.bridge.models.gemma_vl.modeling_gemma3_vl:Gemma3VLModel",
            has=("vision_tower", "multi_modal_projector", "language_model", "freeze"),
        ),
        Name(
            "transformers.models.glm4v.modeling_glm4v:Glm4vVisionModel",
            has=(
                "patch_embed",
                "post_conv_layernorm",
                "embeddings",
                "blocks",
                "post_layernorm",
                "downsample",
                "merger",
            ),
        ),
        Name("megatron.bridge.models.glm_vl.modeling_glm_45v:GLM45VModel", has=("visual", "language_model", "freeze")),
        Name(f"{_PIXTRAL}:PixtralVisionModel", has=("patch_conv", "ln_pre", "transformer")),
        Name(f"{_PIXTRAL}:PixtralAttentionLayer", has=("attention", "feed_forward")),
        Name(
            "megatron.bridge.models.ministral3.modeling_ministral3:Ministral3Model",
            has=("vision_tower", "multi_modal_projector", "get_image_features", "language_model", "freeze"),
        ),
        Name(
            "megatron.bridge.models.kimi_vl.modeling_kimi_k25_vl:KimiK25VLModel",
            has=("vision_tower", "mm_projector", "language_model", "freeze"),
        ),
        Name(
            "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni:Qwen2_5OmniAudioEncoder",
            has=("conv1", "conv2", "audio_bos_eos_token", "layers", "ln_post", "proj", "num_mel_bins"),
        ),
        Name(f"{_OMNI}:Qwen25OmniThinkerModel", has=("visual", "audio_model", "language_model")),
        Name(
            f"{_QWEN3}.model:Qwen3VLModel",
            has=("vision_model", "language_model", "pg_collection", "freeze"),
        ),
        Name(
            f"{_QWEN3}.vision_model:Qwen3VLVisionModel",
            has=("patch_embed", "pos_embed", "decoder", "merger", "fast_pos_embed_interpolate"),
        ),
        Name(f"{_QWEN3}.transformer_block:Qwen3VLVisionTransformerBlock", has=("deepstack_merger_list",)),
        Name(
            f"{_QWEN3}.utils:reorganize_inputs",
            (
                "input_ids",
                "pixel_values",
                "pixel_values_videos",
                "image_grid_thw",
                "video_grid_thw",
                "*",
                "image_token_id",
                "video_token_id",
                "square_merge_size",
            ),
        ),
        Name(
            "megatron.bridge.models.qwen_vl.modeling_qwen25_vl:Qwen25VLModel",
            has=("visual", "language_model", "freeze"),
        ),
    ),
)


def bridge_version() -> str:
    """The installed Megatron-Bridge's. Raises ImportError if there is none."""
    found: str = importlib.import_module("megatron.bridge.package_info").__version__
    return found


def loaded_checkpoint(config: Any) -> tuple[str, dict[str, Any]] | None:
    """The folder of the iteration that Bridge is going to load, and the state in it that all ranks have in common; None
    if there is none. ``config`` is a ``CheckpointConfig``."""
    checkpointing = importlib.import_module("megatron.bridge.training.checkpointing")
    folder = config.load
    if not (
        checkpointing.checkpoint_exists(folder) or checkpointing._has_global_non_persistent_checkpoint(folder, config)
    ):
        return None
    state, path, _, _ = checkpointing._load_base_checkpoint(folder, config, rank0=True, pg_collection=None)
    return None if state is None else (str(path), state)
