"""What a model's configs ask for that DIP can't run, whatever loop they come from."""

from __future__ import annotations

import re
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
        _check_userbuffers(config)
        _check_order(config)
        _check_layer_names(config)
    notes = check_experts(known, parallel)
    if any(getattr(config, "fp8", None) and not getattr(config, "fp8_param", False) for config in known):
        notes.add(
            "fp8: layers cast their weights anew for each microbatch, and plans don't count these copies; keep "
            "parameters in FP8 (fp8_param, --fp8-param-gather), or lower DIP's memory limit (docs/executor.md)"
        )
    return notes


_LAYER = re.compile(r"layers?\.[^*]*\d")
_OFFLOADS = "it gives activations back in the order of Megatron's own schedule"
_OWN_OFFLOAD = "leave it out (offload: true lets DIP's plans offload)"
_GATHERS = "every layer gathers its weights from ranks that have plans of their own"


def _check_order(config: Any) -> None:
    """Refuse what would give a layer another microbatch's activations, leave out gradients, or join ranks in layers
    that plans run apart."""
    for name, most, reason, way_out in (
        ("fine_grained_activation_offloading", 0, _OFFLOADS, _OWN_OFFLOAD),
        ("cpu_offloading", 0, _OFFLOADS, _OWN_OFFLOAD),
        ("moe_paged_stash", 0, "it stashes in the order of Megatron's own schedule", "leave it out"),
        ("defer_embedding_wgrad_compute", 0, "DIP defers weight gradients by plan", "leave it out"),
        ("gtp_weight_remat_size", 1, _GATHERS, "leave it at 1"),
        ("expert_gtp_weight_remat_size", 1, _GATHERS, "leave it at 1"),
    ):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > most:  # True is 1
            raise ConfigurationError(f"DIP and {name} {value}: {reason}; {way_out}, or use --dip-schedule off")


def name_a_layer(patterns: Iterable[Any]) -> str | None:
    """The first of these patterns of modules' or parameters' names that holds a layer's number, which is its place in
    its chunk."""
    return next((pattern for pattern in patterns if isinstance(pattern, str) and _LAYER.search(pattern)), None)


def _check_layer_names(config: Any) -> None:
    """A recipe that gives layers a precision of their own."""
    matchers = getattr(getattr(config, "quant_recipe", None), "matchers", None) or ()
    found = name_a_layer(getattr(matcher, "pattern", None) for matcher in matchers)
    if found is not None:
        raise ConfigurationError(
            f"DIP and quant_recipe: its pattern {found!r} means a layer by its place in a chunk, and DIP cuts others; "
            "use patterns without a layer's number, or --dip-schedule off"
        )


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


def _check_userbuffers(config: Any) -> None:
    """Adapters switch them off where they can (:mod:`.switched_off`)."""
    if getattr(config, "tp_comm_overlap", False):
        raise ConfigurationError(
            "DIP and tp_comm_overlap: its buffers hold one length of sequences, a plan's microbatches have many, and "
            "weight gradients that wait would find others' data there; set tp_comm_overlap to False, or use "
            "--dip-schedule off"
        )
