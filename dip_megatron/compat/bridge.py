"""Megatron-Bridge from the inside, and the vision transformer that it takes from Hugging Face."""

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
        Name("megatron.bridge.training.train:make_data_iterator_list", ("model", "data_iterator")),
        Name("megatron.bridge.training.eval:make_data_iterator_list", ("model", "data_iterator")),
    ),
)
TESTED = (0, 6)
"""The minor release that the tests cover."""
_VISION = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
TOPIC = Topic(
    "Qwen2.5-VL in segments",
    "megatron-bridge",
    "0.6.2 with transformers 5.12.1",
    "Megatron-Bridge's Qwen2.5-VL can't be trained under DIP",
    (
        Name(
            f"{_VISION}:Qwen2_5_VisionTransformerPretrainedModel",
            has=("patch_embed", "blocks", "merger", "fullatt_block_indexes", "spatial_merge_unit"),
        ),
        Name(f"{_VISION}:Qwen2_5_VLVisionBlock", has=("attn", "mlp")),
        Name("megatron.bridge.utils.common_utils:hook_hf_module_setattr_for_tp_grad_sync", ("module",)),
        Name(
            "megatron.bridge.models.qwen_vl.modeling_qwen25_vl:Qwen25VLModel",
            has=("visual", "get_image_features", "get_video_features", "language_model", "freeze"),
        ),
    ),
)


def bridge_version() -> str:
    """The installed Megatron-Bridge's. Raises ImportError if there is none."""
    found: str = importlib.import_module("megatron.bridge.package_info").__version__
    return found


def vision_transformer(config: Any) -> Any:
    """Hugging Face's vision transformer of Qwen2.5-VL, as Bridge builds it."""
    from megatron.bridge.utils.common_utils import hook_hf_module_setattr_for_tp_grad_sync
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    return hook_hf_module_setattr_for_tp_grad_sync(Qwen2_5_VisionTransformerPretrainedModel._from_config(config))
