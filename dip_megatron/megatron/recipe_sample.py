"""What a recipe of Megatron-Bridge trains, found without training: its model as its provider would build it. Its data
aren't read: they often come from a hub, through a tokenizer of the model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from ..families.family import ModelFamily
from ..families.multimodal.bridge_models import BRIDGE_FAMILIES
from .adapters.bridge_checks import check_bridge, parallel_of
from .adapters.megatron_bridge import take_layout
from .build import record_blueprint
from .sampling import Sample
from .switched_off import switch_off


def replica_size(config: Any) -> int:
    """GPUs of one replica of a ``ConfigContainer``."""
    model = config.model
    return int(
        model.tensor_model_parallel_size * model.pipeline_model_parallel_size * (model.context_parallel_size or 1)
    )


def sample_of_recipe(config: Any, known: Sequence[ModelFamily], gpus: int) -> Sample:
    """Of a ``ConfigContainer`` on ``gpus`` of which this process takes itself for the first. Raises
    ConfigurationError for what DIP refuses, and what a provider raises."""
    model, train = config.model, config.train
    config.data_parallel_size = gpus // replica_size(config)
    switch_off(config.model)
    check_bridge(config, "dynamic")
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        model.tensor_model_parallel_size, model.pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size or 1,
        expert_model_parallel_size=model.expert_model_parallel_size or 1,
        expert_tensor_parallel_size=model.expert_tensor_parallel_size,
    )  # fmt: skip
    layout = take_layout(model)
    if hasattr(model, "finalize"):
        model.finalize()
    families = [*known, *(f for f in BRIDGE_FAMILIES if f not in known)]
    family, blueprint = record_blueprint(families, model.provide, pre_process=True, post_process=True)
    each = max(train.global_batch_size // (train.micro_batch_size * config.data_parallel_size), 1)
    described = family.describe(blueprint, parallel_of(config))
    return Sample(described, family.workload, each, config.data_parallel_size, layout)
