"""Megatron-Core's local linears with a backward in two: input gradients in B, weight gradients in W.

Nothing in Megatron is replaced. Each linear of a chunk gets a ``_forward_impl`` of its own (the one function through
which Megatron's linears multiply), token tables and patch embeddings a ``forward`` that cuts the graph behind them. All
do exactly what Megatron does unless the stage that runs is split (:class:`runtime.modes.StageMode`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    LinearWithGradAccumulationAndAsyncCommunication,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.utils import prepare_input_tensors_for_wgrad_compute

from ...runtime.deferred import WeightGradients, accumulate, cut
from ...runtime.modes import StageMode
from . import deferred_te
from .deferred_te import StageStore

_ARGUMENTS = tuple(inspect.signature(LinearWithGradAccumulationAndAsyncCommunication.forward).parameters)[1:]
"""What Megatron's linear takes; releases add to it at the end."""
_DEFAULTS: dict[str, Any] = {
    "grad_output_buffer": None, "wgrad_deferral_limit": None, "gtp_remat_size": 1, "output_dtype": None,
}  # fmt: skip
_KNOWN = {
    *_DEFAULTS, "input", "weight", "bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel",
    "tp_group",
}  # fmt: skip
_WITHOUT_INPUT_GRADIENT = (VocabParallelEmbedding, torch.nn.Conv2d, torch.nn.Conv3d)


class _Target:
    """A parameter and the store of its weight gradient, kept out of autograd's sight."""

    __slots__ = ("parameter", "store")

    def __init__(self, parameter: torch.nn.Parameter, store: WeightGradients):
        self.parameter, self.store = parameter, store


class DeferredLinear(LinearWithGradAccumulationAndAsyncCommunication):
    """Megatron's linear, whose weight gradient is left for W. Its weight comes detached, so that B doesn't reach the
    parameter: hooks see its gradient once, in W."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, target: _Target, *args: Any) -> torch.Tensor:
        """Megatron's forward; ``anchor`` lets autograd come back here even if the input needs no gradient."""
        ctx.target = target
        return LinearWithGradAccumulationAndAsyncCommunication.forward(ctx, *args)

    @staticmethod
    @layers.custom_bwd
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        """Input gradient, and that of the bias; the weight's goes to the store."""
        input_, weight = ctx.saved_tensors
        grad_output = grad_output.to(input_.dtype)  # a head may put out float32 (after 0.19)
        arguments = len(ctx.needs_input_grad)
        gradients: list[Any] = [None] * arguments
        if ctx.needs_input_grad[2]:
            columns = grad_output.size(-1)
            # As Megatron from 0.19 on: torch doesn't fold leading dimensions of size one into one product.
            grad_input = grad_output.reshape(-1, columns).matmul(weight)
            grad_input = grad_input.reshape(*grad_output.shape[:-1], weight.size(1))
            if ctx.sequence_parallel:
                whole, grad_input = grad_input, torch.empty_like(input_)
                layers.dist_reduce_scatter_func(grad_input, whole, group=ctx.tp_group)
            elif ctx.allreduce_dgrad:
                torch.distributed.all_reduce(grad_input, group=ctx.tp_group)
            gradients[2] = grad_input
        if ctx.use_bias and ctx.needs_input_grad[4]:
            gradients[4] = grad_output.reshape(-1, grad_output.size(-1)).sum(dim=0)
        target: _Target = ctx.target
        parameter, group = target.parameter, ctx.tp_group if ctx.sequence_parallel else None
        fused = ctx.gradient_accumulation_fusion
        held = input_.detach()  # without the gradient that the input of a checkpoint would bring along
        target.store.add(lambda: _weight_gradient(parameter, held, grad_output, group, fused))
        ctx.target = None
        return tuple(gradients)


def _weight_gradient(
    parameter: torch.nn.Parameter, input_: torch.Tensor, grad_output: torch.Tensor, gather: Any, fused: bool
) -> None:
    """The second half of Megatron's backward; ``gather``: the group over which the input's sequence is split."""
    with torch.no_grad():
        if gather is not None:
            size = [input_.size(0) * gather.size(), *input_.shape[1:]]
            total = get_global_memory_buffer().get_tensor(size, input_.dtype, "mpu")
            layers.dist_all_gather_func(total, input_, group=gather)
            input_ = total
        grad_output, input_ = prepare_input_tensors_for_wgrad_compute(grad_output, input_)
        if not fused:
            accumulate(parameter, grad_output.t().matmul(input_))
            return
        kernels = layers.fused_weight_gradient_mlp_cuda
        if parameter.main_grad.dtype == torch.float32:
            kernels.wgrad_gemm_accum_fp32(input_, grad_output, parameter.main_grad)
        elif parameter.main_grad.dtype in (torch.float16, torch.bfloat16):
            kernels.wgrad_gemm_accum_fp16(input_, grad_output, parameter.main_grad)
        else:
            raise RuntimeError(f"no fused gradient accumulation into {parameter.main_grad.dtype}")


def _linear(module: torch.nn.Module, mode: StageMode) -> Callable[..., torch.Tensor]:
    megatrons = module._forward_impl

    def forward(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **options: Any) -> torch.Tensor:
        store = mode.weight_gradients
        if store is None or not weight.requires_grad or not torch.is_grad_enabled():
            return megatrons(input=input, weight=weight, bias=bias, **options)
        group = layers.get_tensor_model_parallel_group_if_none(options.get("tp_group"))
        known = _DEFAULTS | options | {"input": input, "weight": weight.detach(), "bias": bias, "tp_group": group}
        return DeferredLinear.apply(store.anchor, _Target(weight, store), *(known[name] for name in _ARGUMENTS))

    return forward


def _without_input_gradient(module: torch.nn.Module, mode: StageMode) -> Callable[..., torch.Tensor]:
    megatrons = module.forward

    def forward(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = megatrons(input, *args, **kwargs)
        store = mode.weight_gradients
        if store is None or input.requires_grad or not torch.is_grad_enabled():
            return output
        return cut(output, store)

    return forward


def install(chunk: torch.nn.Module, mode: StageMode) -> None:
    """Let the layers of a chunk follow ``mode.weight_gradients``, Transformer Engine's too. Call it once, before the
    chunk is wrapped."""
    deferred_te.install(chunk, mode)
    for module in chunk.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            if _splits(module):
                module._forward_impl = _linear(module, mode)
        elif isinstance(module, _WITHOUT_INPUT_GRADIENT):
            module.forward = _without_input_gradient(module, mode)


def _splits(linear: torch.nn.Module) -> bool:
    # Weights that are themselves gathered for each product (0.19's GTP) have a backward of their own, and a linear that
    # takes something unheard of may do something unheard of with it.
    return getattr(linear, "gtp_remat_size", 1) == 1 and set(_ARGUMENTS) <= _KNOWN


def undeferrable(chunk: torch.nn.Module) -> list[str]:
    """Names of the chunk's trained matrices whose gradients W can't compute: they take their time in B.

    Vectors (norms, biases), position embeddings and class tokens are left out; their gradients are always summed up in
    B, where they cost next to nothing.
    """
    handled: set[int] = set()
    for module in chunk.modules():
        linear = isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and _splits(module)
        linear = linear or isinstance(getattr(module, "wgrad_store", None), StageStore)
        if linear or isinstance(module, (*_WITHOUT_INPUT_GRADIENT, torch.nn.Embedding)):
            handled |= {id(p) for p in module.parameters(recurse=False)}
    return [
        name
        for name, p in chunk.named_parameters()
        if p.requires_grad and p.dim() > 1 and p.shape[0] > 1 and id(p) not in handled
    ]
