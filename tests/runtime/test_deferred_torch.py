"""Torch's own linears, of which Hugging Face's encoders are made: B and W together give what autograd gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dip_megatron.families.shared import deferred_linear
from dip_megatron.runtime.deferred import WeightGradients
from dip_megatron.runtime.layer_context import LayerContext


class Encoder(torch.nn.Module):
    """Patches, positions, and an MLP with and without biases."""

    def __init__(self, recomputed: bool = False):
        super().__init__()
        self.patches = torch.nn.Conv1d(3, 8, 2, 2)
        self.pos_emb = torch.nn.Parameter(torch.randn(5, 8))
        self.norm = torch.nn.LayerNorm(8)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8, bias=False)
        self.recomputed = recomputed

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).transpose(1, 2) + self.pos_emb
        return x + (checkpoint(self.mlp, x, use_reentrant=True) if self.recomputed else self.mlp(x))


def encoder(**options: Any) -> Encoder:
    torch.manual_seed(1)
    return Encoder(**options).double()


def gradients(
    model: Encoder, store: WeightGradients | None, mode: LayerContext | None
) -> dict[str, torch.Tensor | None]:
    """After B alone, where there is a store."""
    x = torch.randn(4, 3, 10, generator=torch.Generator().manual_seed(2)).double()
    if mode is None:
        model(x).square().sum().backward()
    else:
        with mode.stage(store):
            model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recomputed", [False, True])
def test_weights_wait_for_w(recomputed: bool) -> None:
    expected = gradients(encoder(recomputed=recomputed), None, None)
    model, mode, store = encoder(recomputed=recomputed), LayerContext(), WeightGradients()
    deferred_linear.install(model, mode)
    deferred_linear.install(model, mode)  # as after a loop has put adapters into it
    early = gradients(model, store, mode)
    assert {name for name, grad in early.items() if grad is None} == {
        "patches.weight", "patches.bias", "up.weight", "down.weight",
    }  # fmt: skip
    store.compute()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-12)


def test_a_stage_that_is_not_split_is_as_without() -> None:
    expected, model, mode = gradients(encoder(), None, None), encoder(), LayerContext()
    deferred_linear.install(model, mode)
    for name, grad in gradients(model, None, mode).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=0)


def test_what_is_frozen_has_no_gradient() -> None:
    model, mode, store = encoder(), LayerContext(), WeightGradients()
    model.up.requires_grad_(False)
    deferred_linear.install(model, mode)
    gradients(model, store, mode)
    store.compute()
    assert model.up.weight.grad is None
    assert model.down.weight.grad is not None


def test_under_autocast_it_is_left_to_torch() -> None:
    """Which casts weights by itself."""
    torch.manual_seed(1)
    model, mode, store = torch.nn.Linear(8, 4), LayerContext(), WeightGradients()
    deferred_linear.install(model, mode)
    with mode.stage(store), torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(2, 8))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert model.weight.grad is not None


class Scaled(torch.nn.Linear):
    """One that multiplies in a way of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_what_can_wait_is_told_from_what_cannot() -> None:
    model = encoder()
    assert deferred_linear.undeferrable(model) == []
    deferred_linear.install(model, LayerContext())
    assert deferred_linear.undeferrable(model) == []
    model.add_module("scaled", Scaled(8, 8))
    model.register_parameter("table", torch.nn.Parameter(torch.zeros(3, 3)))
    assert deferred_linear.undeferrable(model) == ["table", "scaled.weight"]
