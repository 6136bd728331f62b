"""What a model's configs ask for that DIP can't run, whatever loop they come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..describe.files import ConfigurationError
from ..describe.model import Parallel
from .experts import check_experts


def check_configs(configs: Iterable[Any], parallel: Parallel) -> set[str]:
    """What a user should know of how ``configs``, those of a model's parts (and what isn't one), are run. Raises
    ConfigurationError, in one line, if one of them asks for what can't run."""
    known = list(configs)
    for config in known:
        _check_scaling(config, parallel)
        _check_order(config)
    notes = check_experts(known, parallel)
    if any(getattr(config, "fp8", None) and not getattr(config, "fp8_param", False) for config in known):
        notes.add(
            "fp8: layers cast their weights anew for each microbatch, and plans don't count these copies; keep "
            "parameters in FP8 (fp8_param, --fp8-param-gather), or lower DIP's memory limit (docs/executor.md)"
        )
    return notes


_OFFLOADS = "it gives activations back in the order of Megatron's own schedule"
_OWN_OFFLOAD = "leave it out (offload: true lets DIP's plans offload)"
_GATHERS = "every layer gathers its weights from ranks that have plans of their own"


def _check_order(config: Any) -> None:
    """Refuse what would give a layer another microbatch's activations, or join ranks in layers that plans run apart."""
    for name, most, reason, way_out in (
        ("fine_grained_activation_offloading", 0, _OFFLOADS, _OWN_OFFLOAD),
        ("cpu_offloading", 0, _OFFLOADS, _OWN_OFFLOAD),
        ("gtp_weight_remat_size", 1, _GATHERS, "leave it at 1"),
        ("expert_gtp_weight_remat_size", 1, _GATHERS, "leave it at 1"),
    ):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > most:  # True is 1
            raise ConfigurationError(f"DIP and {name} {value}: {reason}; {way_out}, or use --dip-schedule off")


def _check_scaling(config: Any, parallel: Parallel) -> None:
    """With delayed scaling, Transformer Engine takes the maxima of all replicas' values at the end of every forward and
    backward: replicas that run other stages, or more of them, would wait for one another for good, or mix up layers."""
    recipe = getattr(config, "fp8_recipe", None)
    delayed = getattr(config, "fp8", None) and getattr(recipe, "value", recipe) == "delayed"
    if delayed and parallel.dp > 1 and not getattr(config, "tp_only_amax_red", False):
        raise ConfigurationError(
            f"DIP and fp8_recipe delayed: every forward joins all {parallel.dp} replicas for its scales, and each has "
            "a plan of its own; set tp_only_amax_red, or use another recipe (tensorwise, blockwise, mxfp8), or "
            "--dip-schedule off"
        )
