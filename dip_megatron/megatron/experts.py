"""What of a mixture of experts DIP can't run. Imports nothing of Megatron's: flags are checked before it loads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..describe.files import ConfigurationError
from ..describe.model import Parallel

Refusal = tuple[Any, str, str, str]
"""Whether it applies, the setting (as Megatron's configs name it), the reason, the way out."""


def expert_refusals(config: Any, parallel: Parallel) -> list[Refusal]:
    """Of ``config``, Megatron's of a model with experts, or arguments that have the same names."""

    def value(name: str) -> Any:
        return getattr(config, name, None)

    kinds = value("moe_router_load_balancing_type") or ()
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    coefficients = value("moe_aux_loss_coeff") or 0.0
    coefficients = coefficients if isinstance(coefficients, (list, tuple)) else [coefficients] * len(kinds)
    counted = any(k == "global_aux_loss" and c for k, c in zip(kinds, coefficients, strict=False))
    here = parallel.tp * parallel.cp
    leave = "leave it out"
    return [
        (parallel.coupled > 1, f"expert_model_parallel_size {parallel.ep}",
         f"{parallel.coupled} data-parallel replicas would share each group of experts, and plans that are made apart "
         "hang there, or train something else",
         f"spread experts over the {here} ranks that a replica has of a stage (expert_model_parallel_size times "
         f"expert_tensor_parallel_size of at most {here})"),
        (value("mtp_num_layers"), "mtp_num_layers", "multi-token prediction is untried with experts", leave),
        (counted, "moe_router_load_balancing_type global_aux_loss",
         "its running mean over an iteration depends on the order of microbatches, and every call of it joins all "
         "replicas", "use aux_loss or seq_aux_loss"),
        (value("moe_enable_routing_replay"), "moe_enable_routing_replay",
         "it gives recorded routings back in the order of Megatron's own schedule", leave),
        (value("overlap_moe_expert_parallel_comm"), "overlap_moe_expert_parallel_comm",
         "it runs layers of two microbatches in turn, in Megatron's own schedule", leave),
        (value("overlap_dispatch_backward_with_experts_wgrad"), "overlap_dispatch_backward_with_experts_wgrad",
         "it delays the experts' weight gradients by a queue of its own, DIP by plan", leave),
    ]  # fmt: skip


def check_experts(configs: Iterable[Any], parallel: Parallel) -> None:
    """Raises ConfigurationError, in one line, if one of ``configs``, those of a model's parts (and what isn't one),
    asks for what can't run."""
    for config in configs:
        if getattr(config, "num_moe_experts", None):
            for unfit, setting, reason, way_out in expert_refusals(config, parallel):
                if unfit:
                    raise ConfigurationError(f"DIP and {setting}: {reason}; {way_out}, or use --dip-schedule off")
