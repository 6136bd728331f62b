"""What every rank of a training run imports, so that ranks are forked with it instead of importing it each."""

import torch

from dip_megatron.megatron.cpu import install_cpu_platform

install_cpu_platform()
torch.set_num_threads(1)

import megatron.core.models.multimodal.llava_spec  # noqa: E402
import megatron.training.checkpointing  # noqa: E402, F401

import dip_megatron.megatron.hooks  # noqa: E402, F401
