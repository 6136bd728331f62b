"""mcore-bridge's models of a folder, asked for as Megatron-Bridge's are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mcore_bridge.config import ModelConfig, hf_to_mcore_config
from mcore_bridge.model import get_mcore_model_type


class McoreModels:
    """Of ``stages`` pipeline stages of ``tensor`` ranks each, with ``sequence`` parallelism or without; with so many
    depths of multi-token prediction as are ``predicted``."""

    def __init__(self, folder: Path, stages: int, tensor: int = 1, sequence: bool = False, predicted: int = 0):
        from transformers import AutoConfig

        read = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        self._folder = folder
        given = hf_to_mcore_config(read) | {
            "hf_config": read, "mcore_model_type": get_mcore_model_type(read.model_type),
            "params_dtype": torch.float32, "pipeline_model_parallel_size": stages,
            "tensor_model_parallel_size": tensor, "sequence_parallel": sequence, "use_cpu_initialization": True,
            "masked_softmax_fusion": False, "bias_dropout_fusion": False, "bias_activation_fusion": False,
            "cross_entropy_loss_fusion": False, "gradient_accumulation_fusion": False, "overlap_p2p_comm": False,
            "mtp_num_layers": predicted or None,
        }  # fmt: skip
        self.config = ModelConfig(**given)

    def provide(self, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
        return self.config.model_meta.loader(self.config).build_model(pre_process, post_process, vp_stage)

    def load_hf_weights(self, models: list[Any]) -> None:
        self.config.bridge.load_weights(models, str(self._folder))

    def export_hf_weights(self, models: list[Any], **_: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.config.bridge.export_weights(models, target_device="cpu")
