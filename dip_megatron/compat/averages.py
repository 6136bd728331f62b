"""Gradients that Megatron-Core averages over tensor-parallel ranks."""

from __future__ import annotations

import torch

from .names import Name, Topic

TOPIC = Topic(
    "encoders that tensor-parallel ranks hold whole, their images shared out",
    "megatron-core",
    "0.16.1, 0.19.2",
    "such encoders (Hugging Face's modules in Megatron-Bridge) would need tensor parallelism of 1",
    (
        Name(
            "megatron.core.distributed.finalize_model_grads:_allreduce_non_tensor_model_parallel_grads",
            ("model", "config"),
        ),
    ),
)

_MARK = "average_gradients_across_tp_domain"
"""An attribute of parameters, which that function asks for and Megatron-Core's own HuggingFaceModule sets."""


def average_over_tensor_ranks(parameter: torch.nn.Parameter) -> None:
    """Let finalize_model_grads take the mean of the parameter's gradients over tensor-parallel ranks."""
    setattr(parameter, _MARK, True)
