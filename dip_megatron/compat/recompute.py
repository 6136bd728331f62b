"""Megatron-Core's recomputation of parts of a layer."""

from __future__ import annotations

from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

from .names import Name, Topic

__all__ = ["CORE_ATTENTION", "TOPIC", "CheckpointWithoutOutput"]
CORE_ATTENTION = "checkpoint_core_attention"
"""A layer's own flag for recomputing its attention core, which ``--recompute-modules core_attn`` sets for good."""
_CHECKPOINT = "megatron.core.tensor_parallel.random:CheckpointWithoutOutput"
TOPIC = Topic(
    "recompute, layer by layer",
    "megatron-core",
    "0.16.1, 0.19.2",
    "plans that recompute can't run; use recompute: false",
    (
        Name(_CHECKPOINT, ("*", "fp8")),
        Name(f"{_CHECKPOINT}.checkpoint", ("run_function",)),
        Name(f"{_CHECKPOINT}.discard_output_and_register_recompute", ("hook_tensor",)),
        Name("megatron.core.transformer.attention:Attention", has=(CORE_ATTENTION,)),
        Name("megatron.core.transformer.mlp:MLP", has=("linear_fc1", "linear_fc2")),
        Name("megatron.core.tensor_parallel:checkpoint", ("function", "distribute_saved_activations")),
    ),
)
