"""Settings that make Megatron's own schedules faster and change no result: under DIP they are switched off, and told.

Imports nothing of Megatron's: flags are looked at before it loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

_GRAPHS = {
    "cuda_graph_impl": "none", "vision_cuda_graph_impl": "none", "enable_cuda_graph": False,
    "external_cuda_graph": False,
}  # fmt: skip
_USERBUFFERS = {"tp_comm_overlap": False, "decoder_tp_comm_overlap": False}
_OVERLAP = {
    "overlap_moe_expert_parallel_comm": False, "delay_wgrad_compute": False,
    "ep_overlap_early_attn_memory_release": False,
}  # fmt: skip
_OFFLOAD = {"fine_grained_activation_offloading": False, "offload_modules": []}
_STRAGGLER = {"log_straggler": False}


def switch_off(config: Any) -> list[str]:
    """Change ``config``, Megatron's arguments or a model's provider, to run without CUDA graphs of training, without
    all-to-alls beside another microbatch's layers, without Transformer Engine's userbuffers, and without what else goes
    by the order of Megatron's own schedule; what to say of each that was on."""
    told = []
    if _set(config, _USERBUFFERS):
        told.append(
            "tp_comm_overlap is switched off: its buffers hold one length of sequences, a plan's microbatches have "
            "many, and weight gradients that wait would find others' data there; results are the same"
        )
    if _set(config, _OVERLAP):
        told.append(
            "overlap_moe_expert_parallel_comm is switched off: it runs layers of two microbatches in turn, in "
            "Megatron's own schedule; results are the same"
        )
    if _set(config, _GRAPHS):
        # What inference may capture follows from it.
        scope = getattr(config, "inference_cuda_graph_scope", None)
        if scope is not None:
            config.inference_cuda_graph_scope = type(scope)["none"] if isinstance(scope, Enum) else None
        told.append(
            "CUDA graphs are switched off: a captured chunk has one shape, a plan's microbatches have many; results "
            "are the same"
        )
    if getattr(config, "fine_grained_activation_offloading", False) and _set(config, _OFFLOAD):
        told.append(
            "fine_grained_activation_offloading is switched off: it gives activations back in the order of Megatron's "
            "own schedule; offload: true in --dip-config lets plans offload; results are the same"
        )
    if _set(config, _STRAGGLER):
        told.append(
            "log_straggler is switched off: it times forward_step, in which only a rank with the loss computes; "
            "--dip-trace-dir has each rank's times"
        )
    return told


def _set(config: Any, values: Mapping[str, Any]) -> bool:
    """Whether one of them was anything else."""
    changed = {n: v for n, v in values.items() if getattr(config, n, v) not in (None, v)}
    for name, value in changed.items():
        setattr(config, name, value)
    return bool(changed)
