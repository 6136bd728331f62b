"""The store given to Transformer Engine's linears, against the protocol by which they use theirs."""

from __future__ import annotations

import pytest
import torch

from dip_megatron.families.shared import deferred_te
from dip_megatron.runtime.deferred import WeightGradients
from dip_megatron.runtime.modes import StageMode


class Product(torch.autograd.Function):
    """A linear that asks its store in its backward, as ``transformer_engine.pytorch.Linear`` does."""

    @staticmethod
    def forward(ctx, input_, weight, bias, linear):
        ctx.save_for_backward(input_, weight)
        ctx.linear = linear
        return input_ @ weight.t() + bias

    @staticmethod
    def backward(ctx, grad_output):
        input_, weight = ctx.saved_tensors
        linear = ctx.linear
        weight_gradient = bias_gradient = None

        def product(x, dy):
            gradient = dy.t() @ x
            if linear.fuse_wgrad_accumulation:
                linear.weight.main_grad.add_(gradient)
                gradient = None
            return gradient, dy.sum(0), None

        if linear.wgrad_store is not None and linear.wgrad_store.delay_wgrad_compute():
            linear.wgrad_store.put([input_, grad_output], product)
        else:
            weight_gradient, bias_gradient, _ = product(input_, grad_output)
        return grad_output @ weight, weight_gradient, bias_gradient, None


class Linear(torch.nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
        self.bias = torch.nn.Parameter(torch.zeros(3))
        self.weight_names, self.bias_names, self.use_bias = ["weight"], ["bias"], True
        self.fuse_wgrad_accumulation = fused
        self.wgrad_store = None

    def forward(self, x):
        return Product.apply(x, self.weight, self.bias, self)


@pytest.mark.parametrize("fused", [False, True])
def test_units_in_any_order(fused):
    """Two units' backwards in two, W in the opposite order; a third unit's backward at once."""
    linear, mode = Linear(fused), StageMode()
    deferred_te.install(linear, mode)
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    hooks = []
    for p in linear.parameters():
        p.main_grad = torch.zeros_like(p)
        node = p.expand_as(p).grad_fn.next_functions[0][0]

        def hook(*_, p=p):
            if p is linear.weight and fused:
                return
            assert p.grad is not None  # as DDP demands when reductions overlap
            p.main_grad.add_(p.grad)
            p.grad = None

        node.register_hook(hook)
        hooks.append(node)
    stores = []
    for unit in x[:2]:
        store = WeightGradients()
        with mode.stage(store):
            linear(unit).square().sum().backward()
        assert not linear.weight.main_grad.any()
        linear.weight.grad = None
        stores.append(store)
    with mode.stage(None):
        linear(x[2]).square().sum().backward()
    for store in reversed(stores):
        store.compute()
    weight, bias = linear.weight.detach().requires_grad_(), linear.bias.detach().requires_grad_()
    (x @ weight.t() + bias).square().sum().backward()
    torch.testing.assert_close(linear.weight.main_grad, weight.grad)
    torch.testing.assert_close(linear.bias.main_grad, bias.grad)
