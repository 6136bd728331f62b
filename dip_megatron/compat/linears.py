"""Megatron-Core's tensor-parallel linears from the inside: how they multiply, gather and accumulate.

Looked up at each call where tests and users may have put something else in their place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication
from megatron.core.utils import prepare_input_tensors_for_wgrad_compute

from .names import Name, Topic

_LAYERS = "megatron.core.tensor_parallel.layers"
TOPIC = Topic(
    "linears whose weight gradient can wait",
    "megatron-core",
    "0.16.1, 0.19.2",
    "plans can't split the backward of Megatron's local linears; use split_backward: false",
    (
        Name(
            f"{_LAYERS}:LinearWithGradAccumulationAndAsyncCommunication.forward",
            ("ctx", "input", "weight", "bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel",
             "grad_output_buffer", "wgrad_deferral_limit", "tp_group"),
        ),
        Name(f"{_LAYERS}:ColumnParallelLinear", has=("_forward_impl",)),
        Name(
            f"{_LAYERS}:RowParallelLinear",
            has=("_forward_impl", "explicit_expert_comm", "sequence_parallel", "tp_group"),
        ),
        Name(f"{_LAYERS}:custom_bwd"),
        Name(f"{_LAYERS}:dist_reduce_scatter_func", ("output", "input", "*", "group")),
        Name(f"{_LAYERS}:get_tensor_model_parallel_group_if_none", ("tp_group",)),
        Name(
            "megatron.core.utils:prepare_input_tensors_for_wgrad_compute", ("grad_output", "all_gathered_input")
        ),
    ),
)  # fmt: skip

Multiplication: Any = LinearWithGradAccumulationAndAsyncCommunication
ARGUMENTS = tuple(inspect.signature(Multiplication.forward).parameters)[1:]
"""What Megatron's linear takes; releases add to it at the end."""
DEFAULTS: dict[str, Any] = {
    "grad_output_buffer": None, "wgrad_deferral_limit": None, "gtp_remat_size": 1, "output_dtype": None,
}  # fmt: skip
_KNOWN = {
    *DEFAULTS, "input", "weight", "bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel",
    "tp_group",
}  # fmt: skip

backward_without_autocast = layers.custom_bwd
"""Decorator of the backward of a function like Megatron's, whose ``forward`` has its own."""


def multiplication(linear: torch.nn.Module) -> Callable[..., torch.Tensor]:
    """The one function through which a linear of Megatron's multiplies."""
    function: Callable[..., torch.Tensor] = linear._forward_impl
    return function


def replace_multiplication(linear: torch.nn.Module, function: Callable[..., torch.Tensor]) -> None:
    """Let a linear multiply through ``function``, called with the same keywords."""
    linear._forward_impl = function


def understood(linear: torch.nn.Module) -> bool:
    """Whether the linear's multiplication is one whose two gradients we can compute apart."""
    # Weights that are themselves gathered for each product (0.19's GTP) have a backward of their own, and a linear that
    # takes something unheard of may do something unheard of with it.
    return getattr(linear, "gtp_remat_size", 1) == 1 and set(ARGUMENTS) <= _KNOWN


def group_or_default(group: Any) -> Any:
    """The tensor-parallel group that a linear means by ``group``, which may be None."""
    return layers.get_tensor_model_parallel_group_if_none(group)


def reduce_scatter(output: torch.Tensor, whole: torch.Tensor, group: Any) -> None:
    """Sum ``whole`` over the group and leave this rank's part in ``output``."""
    layers.dist_reduce_scatter_func(output, whole, group=group)


def scattered_over(linear: torch.nn.Module) -> Any:
    """The group over which a row-parallel linear scatters its output along the sequence, None if it doesn't. The
    gradient that its multiplication is given has then been gathered over that group."""
    if not isinstance(linear, layers.RowParallelLinear) or not linear.sequence_parallel or linear.explicit_expert_comm:
        return None
    return linear.tp_group if linear.tp_group.size() > 1 else None


def as_matrices(grad_output: torch.Tensor, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with their leading dimensions folded into one."""
    grad_output, input_ = prepare_input_tensors_for_wgrad_compute(grad_output, input_)
    return grad_output, input_


def accumulate_fused(parameter: torch.nn.Parameter, input_: torch.Tensor, grad_output: torch.Tensor) -> None:
    """Add the product of two matrices to ``main_grad``, through Apex's kernels. Raises RuntimeError for a dtype that
    they don't have."""
    kernels = layers.fused_weight_gradient_mlp_cuda
    main_grad: torch.Tensor = parameter.main_grad  # type: ignore[assignment]
    if main_grad.dtype == torch.float32:
        kernels.wgrad_gemm_accum_fp32(input_, grad_output, main_grad)
    elif main_grad.dtype in (torch.float16, torch.bfloat16):
        kernels.wgrad_gemm_accum_fp16(input_, grad_output, main_grad)
    else:
        raise RuntimeError(f"no fused gradient accumulation into {main_grad.dtype}")
