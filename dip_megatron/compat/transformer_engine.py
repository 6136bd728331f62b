"""Transformer Engine's linears from the inside, and what Megatron-Core makes of them. Needs no Transformer Engine to be
imported."""

from __future__ import annotations

from typing import Any

import torch

from .names import Name, Topic

_LINEAR = (
    "wgrad_store", "weight_names", "bias_names", "fuse_wgrad_accumulation", "use_bias", "sequence_parallel",
    "parallel_mode", "tp_group",
)  # fmt: skip
_GROUPED = ("wgrad_store", "num_gemms", "fuse_wgrad_accumulation", "use_bias")
_FLAGS = ("is_first_microbatch", "disable_parameter_transpose_cache")
TOPIC = Topic(
    "Transformer Engine's linears whose weight gradient can wait",
    "transformer-engine",
    "2.3 on, read in its source and not run",
    "plans can't split the backward of Transformer Engine's linears; use split_backward: false",
    (
        Name("transformer_engine.pytorch.module.linear:Linear", has=_LINEAR),
        Name("transformer_engine.pytorch.module.layernorm_linear:LayerNormLinear", has=_LINEAR),
        Name("transformer_engine.pytorch.module._common:WeightGradStore.delay_wgrad_compute", ()),
        Name("transformer_engine.pytorch.module._common:WeightGradStore.put", ("tensor_list", "func")),
        Name("transformer_engine.pytorch.module.grouped_linear:GroupedLinear", has=_GROUPED),
        Name("megatron.core.extensions.transformer_engine:te_checkpoint"),
        Name("megatron.core.extensions.transformer_engine:TELinear", has=_FLAGS),
        Name("megatron.core.extensions.transformer_engine:TEColumnParallelLinear"),
        Name("megatron.core.extensions.transformer_engine:TENorm"),
    ),
)


def has_one_weight(module: torch.nn.Module) -> bool:
    """Whether a module is a linear of Transformer Engine's with one weight, whose gradient can be computed apart. Where
    its communication overlaps with the weight gradient, B can't go without it."""
    return (
        hasattr(module, "wgrad_store")
        and len(getattr(module, "weight_names", ())) == 1
        and not getattr(module, "ub_bulk_wgrad", False)
    )


def has_grouped_weights(module: torch.nn.Module) -> bool:
    """Whether a module is a linear of Transformer Engine's with a weight for each group of rows (experts), whose
    gradients can be computed apart."""
    return (
        hasattr(module, "wgrad_store") and hasattr(module, "num_gemms") and hasattr(module, "weight0")
        and hasattr(module, "fuse_wgrad_accumulation")
    )  # fmt: skip


def grouped_parameters(linear: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Weights of all groups, and their biases, if they have some."""
    groups = range(linear.num_gemms)  # type: ignore[arg-type]
    biases = [getattr(linear, f"bias{i}") for i in groups] if linear.use_bias else []
    return [getattr(linear, f"weight{i}") for i in groups], biases


def accumulates_fused(linear: torch.nn.Module) -> bool:
    """Whether its products add weight gradients to main_grad by themselves."""
    return bool(linear.fuse_wgrad_accumulation)


def always_accumulate(module: torch.nn.Module) -> None:
    """Let every weight gradient be added to main_grad.

    Megatron tells a layer of Transformer Engine that the first forward after its weights have changed is of the first
    microbatch. With fused accumulation the layer then lets that microbatch's gradient overwrite main_grad, as the first
    one to be computed. Under a plan others may be computed before. A layer that isn't told adds, always; in low
    precision it casts its weight for each microbatch."""
    if all(hasattr(module, flag) for flag in _FLAGS):
        module.disable_parameter_transpose_cache = True  # type: ignore[assignment]


def store_of(module: torch.nn.Module) -> Any:
    """What a linear asks whether to compute its weight gradient; None for other modules."""
    return getattr(module, "wgrad_store", None)


def replace_store(linear: torch.nn.Module, store: Any) -> None:
    """Give a linear another such object."""
    linear.wgrad_store = store


def gathered_operand(linear: torch.nn.Module) -> tuple[int, Any] | None:
    """Which operand of a weight gradient (0: the input, 1: the output's gradient) the linear has gathered along the
    sequence before, and over which group; None if neither."""
    group, mode = getattr(linear, "tp_group", None), getattr(linear, "parallel_mode", None)
    if not getattr(linear, "sequence_parallel", False) or group is None or mode not in ("column", "row"):
        return None
    return (0 if mode == "column" else 1), group


def weight_to_accumulate(linear: torch.nn.Module) -> torch.nn.Parameter | None:
    """The weight that a late gradient is to be added to; None where the product has added it to main_grad already."""
    if accumulates_fused(linear):
        return None
    weight: torch.nn.Parameter = getattr(linear, linear.weight_names[0])  # type: ignore[index]
    return weight


def bias_to_accumulate(linear: torch.nn.Module) -> torch.nn.Parameter | None:
    """The bias that a late gradient is to be added to, if the linear has one."""
    if not linear.use_bias:
        return None
    bias: torch.nn.Parameter = getattr(linear, linear.bias_names[0])  # type: ignore[index]
    return bias


def checkpoint(*arguments: Any) -> Any:
    """Megatron's checkpoint of layers in low precision."""
    from megatron.core.extensions.transformer_engine import te_checkpoint

    return te_checkpoint(*arguments)


def column_parallel_linear() -> Any:
    """Transformer Engine's linear without a norm, as Megatron's specs name it."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    return TEColumnParallelLinear


def norm() -> Any:
    """Transformer Engine's norm, as Megatron's specs name it."""
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
