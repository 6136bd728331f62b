"""Mixtures of experts in Megatron-Core from the inside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.router import Router

from .layer_specs import TransformerBlockSubmodules
from .names import Name, Topic

__all__ = ["TOPIC", "BaseMoELayer", "Router"]
TOPIC = Topic(
    "mixtures of experts in segments",
    "megatron-core",
    "0.16.1, 0.19.2",
    "models with experts can't be trained under DIP",
    (
        Name("megatron.core.transformer.moe.moe_layer:BaseMoELayer", has=("experts", "shared_experts", "router")),
        Name("megatron.core.transformer.moe.router:Router", has=("weight",)),
        Name("megatron.core.transformer.moe.experts:SequentialMLP", has=("local_experts",)),
        Name("megatron.core.transformer.moe.experts:TEGroupedMLP", has=("activation_recompute",)),
    ),
)


def layers_with_experts(spec: Any, layers: int) -> tuple[bool, ...]:
    """Of each of a model's ``layers``, whether its MLP is a mixture of experts. ``spec`` describes one layer, the same
    for all, or lists each."""
    if isinstance(spec, TransformerBlockSubmodules):
        return tuple(_has_experts(layer) for layer in spec.layer_specs or ())
    return (_has_experts(spec),) * layers


def _has_experts(layer: Any) -> bool:
    mlp = getattr(getattr(layer, "submodules", None), "mlp", None)
    kind = mlp.func if isinstance(mlp, partial) else getattr(mlp, "module", mlp)  # a builder, or (0.16) a spec
    return isinstance(kind, type) and issubclass(kind, BaseMoELayer)


def configs_of_experts(chunks: Iterable[torch.nn.Module]) -> Iterator[Any]:
    """The configs of the mixtures of experts that are in ``chunks``."""
    return (module.config for chunk in chunks for module in chunk.modules() if isinstance(module, BaseMoELayer))


def expert_mlps(layer: torch.nn.Module) -> Sequence[torch.nn.Module]:
    """The MLPs of a MoE layer's experts on this rank, where each is a module of its own; none where they are one."""
    experts: Any = layer.experts
    return list(experts.local_experts) if isinstance(experts, SequentialMLP) else ()


@contextlib.contextmanager
def activations_recomputed(layer: torch.nn.Module) -> Iterator[None]:
    """Within, a MoE layer's experts that are one module recompute their activation function, as ``--recompute-modules
    moe_act`` has them do for good. Experts without such a switch go on as they are."""
    experts: Any = layer.experts
    before = getattr(experts, "activation_recompute", None)
    if before is not None:
        experts.activation_recompute = True
    try:
        yield
    finally:
        if before is not None:
            experts.activation_recompute = before
