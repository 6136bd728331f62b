"""The store given to Transformer Engine's linears, against the protocol by which they use theirs."""

from __future__ import annotations

import pytest
import torch

from dip_megatron.families.shared import deferred_linear, deferred_te
from dip_megatron.runtime.deferred import WeightGradients
from dip_megatron.runtime.layer_context import LayerContext


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
    linear, mode = Linear(fused), LayerContext()
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


class GroupedProduct(torch.autograd.Function):
    """As ``transformer_engine.pytorch.GroupedLinear``: what waits is a list for all groups; without fused accumulation
    the memory for weight gradients is what autograd gets, written to or not."""

    @staticmethod
    def forward(ctx, input_, linear, *weights):
        ctx.save_for_backward(input_, *weights)
        ctx.linear = linear
        return torch.cat([rows @ weight.t() for rows, weight in zip(input_.split([2, 3]), weights, strict=True)])

    @staticmethod
    def backward(ctx, grad_output):
        input_, *weights = ctx.saved_tensors
        linear = ctx.linear
        inputs, gradients = input_.split([2, 3]), grad_output.split([2, 3])
        found = [torch.full_like(weight, torch.nan) for weight in weights]
        outputs = [weight.main_grad for weight in weights_of(linear)] if linear.fuse_wgrad_accumulation else found

        def product(xs, dys, outs):
            for x, dy, out in zip(xs, dys, outs, strict=True):
                out.copy_(dy.t() @ x + (out if linear.fuse_wgrad_accumulation else 0.0))
            return None, [None, None], None

        if linear.wgrad_store is not None and linear.wgrad_store.delay_wgrad_compute():
            linear.wgrad_store.put([inputs, gradients, outputs], product)
        else:
            product(inputs, gradients, outputs)
        if linear.fuse_wgrad_accumulation:
            found = [torch.zeros(()).expand_as(weight) for weight in weights]  # it says that main_grad has it
        return torch.cat([dy @ w for dy, w in zip(gradients, weights, strict=True)]), None, *found


def weights_of(linear):
    return [linear.weight0, linear.weight1]


class GroupedLinear(torch.nn.Module):
    def __init__(self, fused):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight0, self.weight1 = (torch.nn.Parameter(torch.randn(3, 4, generator=draw)) for _ in range(2))
        self.num_gemms, self.use_bias, self.fuse_wgrad_accumulation = 2, False, fused
        self.wgrad_store = None

    def forward(self, x):
        return GroupedProduct.apply(x, self, *weights_of(self))


@pytest.mark.parametrize("thawed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_weights_of_groups_in_any_order(fused, thawed):
    """As one weight's; also of weights that train only once their layers are prepared."""
    linear, mode = GroupedLinear(fused), LayerContext()
    linear.requires_grad_(not thawed)
    deferred_te.install(linear, mode)
    assert deferred_linear.undeferrable(linear) == []
    linear.requires_grad_(True)
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for p in linear.parameters():
        p.main_grad = torch.zeros_like(p)
    stores = []
    for unit in x[:2]:
        store = WeightGradients()
        with mode.stage(store):
            linear(unit).square().sum().backward()
        for p in linear.parameters():
            assert not p.main_grad.any()
            assert p.grad is None or not p.grad.any()
            p.grad = None
        stores.append(store)
    with mode.stage(None):
        linear(x[2]).square().sum().backward()
    for p in linear.parameters():  # as DDP's hook does
        p.main_grad.add_(0.0 if fused else p.grad)
        p.grad = None
    for store in reversed(stores):
        store.compute()
    for i, p in enumerate(weights_of(linear)):
        weight, rows = p.detach().requires_grad_(), x.detach().split([2, 3], dim=1)[i]
        (rows @ weight.t()).square().sum().backward()
        torch.testing.assert_close(p.main_grad, weight.grad)


class Told(Linear):
    """Megatron's layer on it, which is told which microbatch is the first; with fused accumulation that one's gradient
    is written over what ``main_grad`` has."""

    def __init__(self):
        super().__init__(fused=True)
        self.is_first_microbatch, self.disable_parameter_transpose_cache = True, False

    def forward(self, x):
        first = not self.disable_parameter_transpose_cache and self.is_first_microbatch
        self.is_first_microbatch = False
        output = super().forward(x)
        if first:
            output.register_hook(lambda _: self.weight.main_grad.zero_())
        return output


@pytest.mark.parametrize("split", [False, True])
def test_the_first_microbatch_does_not_undo_what_came_before(split):
    """Plans may run its backward after others'."""
    linear, mode = Told(), LayerContext()
    deferred_te.install(linear, mode)
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    for p in linear.parameters():
        p.main_grad = torch.zeros_like(p)
    stores = [WeightGradients() if split else None for _ in x]
    outputs = []
    for unit, store in zip(x, stores, strict=True):
        with mode.stage(store):
            outputs.append(linear(unit).square().sum())
    for output, store in reversed(list(zip(outputs, stores, strict=True))):
        with mode.stage(store):
            output.backward()
        if store is not None:
            store.compute()
    weight = linear.weight.detach().requires_grad_()
    (x @ weight.t() + linear.bias.detach()).square().sum().backward()
    torch.testing.assert_close(linear.weight.main_grad, weight.grad)
