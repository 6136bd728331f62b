"""What of a mixture of experts DIP can't run. Imports nothing of Megatron's: flags are checked before it loads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..config import DipConfig
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
    spread = parallel.ep * parallel.expert_tp
    leave = "leave it out"
    return [
        (parallel.coupled > 1 and spread % here, f"expert_model_parallel_size {parallel.ep}",
         f"a group of experts over {spread} ranks would begin or end in the middle of a replica's {here} of a stage",
         f"spread experts over a multiple of {here} ranks"),
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


def check_coupled(config: DipConfig) -> None:
    """Raises ConfigurationError for settings that replicas can't have which share experts."""
    for unfit, setting, reason, way_out in (
        (config.plan_file is not None, "a plan file", "it holds the plans of one replica, and they must agree",
         "leave it out"),
        (config.balance == "free", "balance free", "they must have equally many microbatches", "use balance swap"),
    ):  # fmt: skip
        if unfit:
            raise ConfigurationError(f"replicas that share experts and {setting}: {reason}; {way_out}")


def check_experts(configs: Iterable[Any], parallel: Parallel) -> None:
    """Raises ConfigurationError, in one line, if one of ``configs``, those of a model's parts (and what isn't one),
    asks for what can't run."""
    for config in configs:
        if getattr(config, "num_moe_experts", None):
            for unfit, setting, reason, way_out in expert_refusals(config, parallel):
                if unfit:
                    raise ConfigurationError(f"DIP and {setting}: {reason}; {way_out}, or use --dip-schedule off")
