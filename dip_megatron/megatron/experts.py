"""What of a mixture of experts DIP can't run. Imports nothing of Megatron's: flags are checked before it loads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
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

    joins = counts_over_iteration(config) and parallel.dp > 1
    here = parallel.tp * parallel.cp
    spread = parallel.ep * parallel.expert_tp
    leave = "leave it out"
    return [
        (parallel.sharing > 1 and spread % here, f"expert_model_parallel_size {parallel.ep}",
         f"a group of experts over {spread} ranks would begin or end in the middle of a replica's {here} of a stage",
         f"spread experts over a multiple of {here} ranks"),
        (joins and parallel.coupled < parallel.dp, "moe_router_load_balancing_type global_aux_loss",
         f"every call of it joins all {parallel.dp} replicas, and plans are made together for those that share experts "
         f"alone ({parallel.coupled})",
         f"spread experts over all of them (expert_model_parallel_size {here * parallel.dp // parallel.expert_tp}), or "
         "use aux_loss or seq_aux_loss"),
        (value("moe_enable_routing_replay"), "moe_enable_routing_replay",
         "it gives recorded routings back in the order of Megatron's own schedule", leave),
        (value("overlap_moe_expert_parallel_comm"), "overlap_moe_expert_parallel_comm",
         "it runs layers of two microbatches in turn, in Megatron's own schedule", leave),
        (value("overlap_dispatch_backward_with_experts_wgrad"), "overlap_dispatch_backward_with_experts_wgrad",
         "it delays the experts' weight gradients by a queue of its own, DIP by plan", leave),
    ]  # fmt: skip


def counts_over_iteration(config: Any) -> bool:
    """Whether the balance of a model's experts is a loss over running means of an iteration's tokens per expert."""
    kinds = getattr(config, "moe_router_load_balancing_type", None) or ()
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    coefficients = getattr(config, "moe_aux_loss_coeff", None) or 0.0
    coefficients = coefficients if isinstance(coefficients, (list, tuple)) else [coefficients] * len(kinds)
    return any(k == "global_aux_loss" and c for k, c in zip(kinds, coefficients, strict=False))


def joined_by_balance(configs: Iterable[Any], parallel: Parallel) -> Parallel:
    """``parallel`` as it is for a model of which ``configs`` (and what isn't one) are its parts': with all replicas
    joined where a loss over their counts joins them."""
    joins = any(getattr(config, "num_moe_experts", None) and counts_over_iteration(config) for config in configs)
    return replace(parallel, joined=True) if joins and parallel.dp > 1 else parallel


def check_coupled(config: DipConfig) -> None:
    """Raises ConfigurationError for settings that replicas can't have which share experts."""
    for unfit, setting, reason, way_out in (
        (config.plan_file is not None, "a plan file", "it holds the plans of one replica, and they must agree",
         "leave it out"),
        (config.balance == "free", "balance free", "they must have equally many microbatches", "use balance swap"),
    ):  # fmt: skip
        if unfit:
            raise ConfigurationError(f"replicas that share experts and {setting}: {reason}; {way_out}")


def check_experts(configs: Iterable[Any], parallel: Parallel) -> set[str]:
    """What a user should know of how ``configs``, those of a model's parts (and what isn't one), are run. Raises
    ConfigurationError, in one line, if one of them asks for what can't run."""
    notes = set()
    for config in configs:
        if getattr(config, "num_moe_experts", None):
            for unfit, setting, reason, way_out in expert_refusals(config, parallel):
                if unfit:
                    raise ConfigurationError(f"DIP and {setting}: {reason}; {way_out}, or use --dip-schedule off")
            if counts_over_iteration(config):
                notes.add(
                    "global_aux_loss: its running means go over microbatches in the order in which plans run them: "
                    "gradients differ from those without DIP as they would with microbatches in another order "
                    "(docs/experts.md)"
                )
    return notes
