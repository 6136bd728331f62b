"""Megatron-Core's local linears and torch's with a backward in two: input gradients in B, weight gradients in W.

Nothing in Megatron is replaced. Each of its linears in a chunk gets a function of its own to multiply through, those of
torch (Hugging Face's encoders are made of them), token tables and patch embeddings a ``forward``, the latter one that
cuts the graph behind them. All do exactly what they did unless the stage that runs is split
(:class:`runtime.layer_context.LayerContext`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from ...compat import linears
from ...compat.experts import Router
from ...compat.linears import Multiplication
from ...compat.transformer_engine import store_of
from ...runtime.deferred import WeightGradients, accumulate, cut, own_part
from ...runtime.layer_context import LayerContext
from . import deferred_te
from .deferred_te import OperationStore

_FOLLOWS = "follows_a_stage_mode"
_WITHOUT_INPUT_GRADIENT = (VocabParallelEmbedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
_POSITIONS = re.compile(r"pos(ition)?_?emb")


class _Target:
    """A parameter and the store of its weight gradient, kept out of autograd's sight; the group over which the output
    is scattered along its sequence, if it is."""

    __slots__ = ("output_group", "parameter", "store")

    def __init__(self, parameter: torch.nn.Parameter, store: WeightGradients, output_group: Any):
        self.parameter, self.store, self.output_group = parameter, store, output_group


class DeferredLinear(Multiplication):
    """Megatron's linear, whose weight gradient is left for W. Its weight comes detached, so that B doesn't reach the
    parameter: hooks see its gradient once, in W."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, target: _Target, *args: Any) -> torch.Tensor:
        """Megatron's forward; ``anchor`` lets autograd come back here even if the input needs no gradient."""
        ctx.target = target
        return Multiplication.forward(ctx, *args)  # type: ignore[no-any-return]

    @staticmethod
    @linears.backward_without_autocast
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
                linears.reduce_scatter(grad_input, whole, ctx.tp_group)
            elif ctx.allreduce_dgrad:
                torch.distributed.all_reduce(grad_input, group=ctx.tp_group)
            gradients[2] = grad_input
        if ctx.use_bias and ctx.needs_input_grad[4]:
            gradients[4] = grad_output.reshape(-1, grad_output.size(-1)).sum(dim=0)
        target: _Target = ctx.target
        parameter, store, fused = target.parameter, target.store, ctx.gradient_accumulation_fusion
        held = input_.detach()  # without the gradient that the input of a checkpoint would bring along
        gathered = (0, ctx.tp_group) if ctx.sequence_parallel else None
        if gathered is None and target.output_group is not None and store.waits:
            gathered = (1, target.output_group)
            grad_output = own_part(grad_output, target.output_group)
        store.add_product(lambda x, dy: _weight_gradient(parameter, x, dy, fused), held, grad_output, gathered)
        ctx.target = None
        return tuple(gradients)


def _weight_gradient(
    parameter: torch.nn.Parameter, input_: torch.Tensor, grad_output: torch.Tensor, fused: bool
) -> None:
    """The second half of Megatron's backward, of an input and an output's gradient with their whole sequence."""
    with torch.no_grad():
        grad_output, input_ = linears.as_matrices(grad_output, input_)
        if fused:
            linears.accumulate_fused(parameter, input_, grad_output)
        else:
            accumulate(parameter, grad_output.t().matmul(input_))


def _linear(module: torch.nn.Module, mode: LayerContext) -> Callable[..., torch.Tensor]:
    megatrons = linears.multiplication(module)

    def forward(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **options: Any) -> torch.Tensor:
        store = mode.weight_gradients
        if store is None or not weight.requires_grad or not torch.is_grad_enabled():
            return megatrons(input=input, weight=weight, bias=bias, **options)
        group = linears.group_or_default(options.get("tp_group"))
        known = (
            linears.DEFAULTS | options | {"input": input, "weight": weight.detach(), "bias": bias, "tp_group": group}
        )
        target = _Target(weight, store, linears.scattered_over(module))
        return DeferredLinear.apply(store.anchor, target, *(known[name] for name in linears.ARGUMENTS))

    return forward


class _PlainLinear(torch.autograd.Function):
    """Torch's linear, whose weight gradient is left for W; as :class:`DeferredLinear`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, target: _Target, input: torch.Tensor, weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        ctx.target = target
        ctx.save_for_backward(input, weight)
        return torch.nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:  # type: ignore[override]
        input_, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad_input = grad_output.matmul(weight) if needed[2] else None
        grad_bias = grad_output.reshape(-1, grad_output.size(-1)).sum(dim=0) if needed[4] else None
        parameter = ctx.target.parameter
        held = input_.detach()  # without the gradient that the input of a checkpoint would bring along
        ctx.target.store.add_product(lambda x, dy: _plain_gradient(parameter, x, dy), held, grad_output)
        ctx.target = None
        return None, None, grad_input, None, grad_bias


def _plain_gradient(parameter: torch.nn.Parameter, input_: torch.Tensor, grad_output: torch.Tensor) -> None:
    with torch.no_grad():
        rows = grad_output.reshape(-1, grad_output.size(-1))
        accumulate(parameter, rows.t().matmul(input_.reshape(-1, input_.size(-1))))


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether it is torch's linear as it is, or as :func:`install` has left it."""
    linear = isinstance(module, torch.nn.Linear) and type(module).forward is torch.nn.Linear.forward
    own = module.__dict__.get("forward")
    return linear and "weight" in module._parameters and (own is None or hasattr(own, _FOLLOWS))


def _plain(module: torch.nn.Linear, mode: LayerContext) -> Callable[..., torch.Tensor]:
    torchs = module.forward

    def forward(input: torch.Tensor) -> torch.Tensor:
        store, weight = mode.weight_gradients, module.weight
        fits = input.dtype == weight.dtype and not torch.is_autocast_enabled(input.device.type)
        if store is None or not weight.requires_grad or not torch.is_grad_enabled() or not fits:
            return torchs(input)
        target = _Target(weight, store, None)
        output: torch.Tensor = _PlainLinear.apply(store.anchor, target, input, weight.detach(), module.bias)
        return output

    return forward


def _without_input_gradient(module: torch.nn.Module, mode: LayerContext) -> Callable[..., torch.Tensor]:
    megatrons = module.forward

    def forward(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = megatrons(input, *args, **kwargs)
        store = mode.weight_gradients
        if store is None or input.requires_grad or not torch.is_grad_enabled():
            return output
        return cut(output, store)

    return forward


def install(chunk: torch.nn.Module, mode: LayerContext) -> None:
    """Let the layers of a chunk follow ``mode.weight_gradients``, Transformer Engine's too; those that do already are
    left alone. Call it before the chunk is wrapped, and again where a loop has put layers (adapters) into it since."""
    deferred_te.install(chunk, mode)
    for module in chunk.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            if linears.understood(module) and not hasattr(linears.multiplication(module), _FOLLOWS):
                linears.replace_multiplication(module, _marked(_linear(module, mode)))
        elif isinstance(module, _WITHOUT_INPUT_GRADIENT) and not hasattr(module.forward, _FOLLOWS):
            module.forward = _marked(_without_input_gradient(module, mode))
        elif isinstance(module, torch.nn.Linear) and _is_plain(module) and not hasattr(module.forward, _FOLLOWS):
            module.forward = _marked(_plain(module, mode))  # type: ignore[method-assign]


def _marked(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    setattr(function, _FOLLOWS, True)
    return function


def undeferrable(chunk: torch.nn.Module) -> list[str]:
    """Names of the chunk's trained matrices whose gradients W can't compute: they take their time in B.

    Vectors (norms, biases), position embeddings, class tokens, routers to experts and convolutions behind others are
    left out; their gradients are always summed up in B, where they cost next to nothing.
    """
    handled: set[int] = set()
    for module in chunk.modules():
        linear = isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and linears.understood(module)
        linear = linear or isinstance(store_of(module), OperationStore) or _is_plain(module)
        if linear or isinstance(module, (*_WITHOUT_INPUT_GRADIENT, torch.nn.Embedding, Router)):
            handled |= {id(p) for p in module.parameters(recurse=False)}
    return [
        name
        for name, p in chunk.named_parameters()
        if p.requires_grad and p.dim() > 1 and p.shape[0] > 1 and id(p) not in handled and not _POSITIONS.search(name)
    ]
