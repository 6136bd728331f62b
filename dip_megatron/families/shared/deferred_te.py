"""Transformer Engine's linears with a backward in two, through their own delayed weight gradients.

Since 2.3 a linear of Transformer Engine asks its ``wgrad_store``, in its backward, whether to compute the weight
gradient or to put it there: that is what ``delay_wgrad_compute`` and ``backward_dw()`` are made of. Its own store is
one queue per module, to be emptied in order, and Megatron's hooks for it are fixed when a model is built. Here each
linear gets a store that asks the stage that runs: an unsplit stage computes at once, through Megatron's usual hooks, a
split one leaves the product to its own W, in whatever order these come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...compat import transformer_engine as te
from ...runtime.deferred import accumulate, own_part
from ...runtime.layer_context import LayerContext
from ...runtime.offload import OffloadedActivations

_WATCHED = "dip_watches"


class OperationStore:
    """Stands in for a linear's ``WeightGradStore``."""

    def __init__(self, linear: torch.nn.Module, mode: LayerContext, offloaded: OffloadedActivations | None = None):
        """``offloaded``: where the layer leaves its activations, if inputs are to wait in host memory, too."""
        self._linear = linear
        self._mode = mode
        self._offloaded = offloaded

    def hosting(self, offloaded: OffloadedActivations) -> OperationStore:
        """For a forward of a layer whose inputs wait in host memory for W."""
        return OperationStore(self._linear, self._mode, offloaded)

    def delay_wgrad_compute(self) -> bool:
        """Whether the weight gradient is to be put here: the stage that runs is split."""
        waits = self._mode.weight_gradients is not None
        if waits:
            self._watch()
        return waits

    def _watch(self) -> None:
        """Look at what autograd is about to give the parameters that train; others may by the next iteration."""
        for parameter in self._linear.parameters(recurse=False):
            if parameter.requires_grad and not hasattr(parameter, _WATCHED):
                setattr(parameter, _WATCHED, True)
                self._hook(parameter)

    def _hook(self, parameter: torch.nn.Parameter) -> None:
        parameter.register_hook(_placeholder(parameter, self._mode))

    def put(self, tensors: list[Any], product: Callable[..., Any]) -> None:
        """Leave ``product(*tensors)``, the weight gradient (and the bias's), to the stage's W."""
        store = self._mode.weight_gradients
        assert store is not None
        if any(type(x) is not torch.Tensor for x in tensors[:2]):  # in low precision
            store.add(lambda: self._finish(product(*tensors)))
            return
        if self._offloaded is not None:
            store = store.hosting(self._offloaded)
        operands, others = tensors[:2], tensors[2:]
        gathered = te.gathered_operand(self._linear) if store.waits else None
        if gathered is not None:
            place, group = gathered
            if operands[place].size(0) % group.size():
                gathered = None
            else:
                operands[place] = own_part(operands[place], group)
        store.add_product(lambda x, dy: self._finish(product(x, dy, *others)), operands[0], operands[1], gathered)

    def _finish(self, results: tuple[Any, ...]) -> None:
        weight, bias = te.weight_to_accumulate(self._linear), te.bias_to_accumulate(self._linear)
        if weight is not None:
            accumulate(weight, results[0])
        if len(results) > 1 and results[1] is not None and results[1].numel() and bias is not None:
            accumulate(bias, results[1])


class GroupedStore(OperationStore):
    """Of a linear with a weight for each group of rows. What waits are lists: inputs and gradients of all groups'
    outputs, and where weight gradients go, which are main_grads with fused accumulation. Else it is memory that the
    backward has just allocated, and gives autograd as if it were gradients; here it is let go, and allocated again in
    W."""

    def hosting(self, offloaded: OffloadedActivations) -> OperationStore:
        """What waits stays on the device."""
        return self

    def _hook(self, parameter: torch.nn.Parameter) -> None:
        is_weight = any(parameter is weight for weight in te.grouped_parameters(self._linear)[0])
        if is_weight and not te.accumulates_fused(self._linear):  # else what comes says that main_grad has it
            parameter.register_hook(_zeros_for_what_waits(self._mode))
        super()._hook(parameter)

    def put(self, tensors: list[Any], product: Callable[..., Any]) -> None:
        """Leave ``product(*tensors)``, all groups' weight gradients, to the stage's W."""
        store = self._mode.weight_gradients
        assert store is not None
        inputs, gradients, outputs = tensors
        if te.accumulates_fused(self._linear):
            store.add(lambda: self._accumulate(product(inputs, gradients, outputs), ()))
            return
        like = [(x.shape, x.dtype, x.device) for x in outputs]

        def work() -> None:
            found = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in like]
            self._accumulate(product(inputs, gradients, found), found)

        store.add(work)

    def _accumulate(self, results: tuple[Any, ...], found: Sequence[torch.Tensor]) -> None:
        weights, biases = te.grouped_parameters(self._linear)
        for weight, gradient in zip(weights, found, strict=False):
            accumulate(weight, gradient)
        for bias, gradient in zip(biases, results[1] or (), strict=False):
            if gradient is not None and gradient.numel():
                accumulate(bias, gradient)


def install(chunk: torch.nn.Module, mode: LayerContext) -> None:
    """Let Transformer Engine's linears of a chunk follow ``mode.weight_gradients``, but for those that do already, and
    add all gradients up, in whatever order they come."""
    for module in chunk.modules():
        te.always_accumulate(module)
        if isinstance(te.store_of(module), OperationStore):
            continue
        if te.has_grouped_weights(module):
            te.replace_store(module, GroupedStore(module, mode))
        elif te.has_one_weight(module):
            te.replace_store(module, OperationStore(module, mode))


def _placeholder(parameter: torch.nn.Parameter, mode: LayerContext) -> Callable[[torch.Tensor | None], None]:
    """In B the gradient is missing, which DDP's hook refuses if reductions overlap: give it zeros to add."""

    def hook(gradient: torch.Tensor | None) -> None:
        missing = gradient is None and mode.weight_gradients is not None
        if missing and parameter.grad is None and hasattr(parameter, "main_grad"):
            parameter.grad = parameter.new_zeros(()).expand_as(parameter)

    return hook


def _zeros_for_what_waits(mode: LayerContext) -> Callable[[torch.Tensor | None], torch.Tensor | None]:
    """In B a weight of several gets memory that only W would write to as its gradient: make it zeros to add."""

    def hook(gradient: torch.Tensor | None) -> torch.Tensor | None:
        return None if gradient is None or mode.weight_gradients is None else gradient.zero_()

    return hook
