"""What of a Megatron-Bridge configuration DIP can't run, said before anything is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...compat.bridge import HOOKS, TESTED, bridge_version
from ...compat.names import fault
from ...compat.releases import numbers_of
from ...describe.files import ConfigurationError
from ...describe.model import Parallel
from ..experts import counts_over_iteration, expert_refusals


def check_release(tell: Callable[[str], object]) -> None:
    """``tell`` of a release that DIP isn't tested with. Raises ConfigurationError if it has not all that DIP hooks
    into: what a loop gives to schedules through a name that has gone would be missing from the gradients."""
    version = bridge_version()
    faults = [found for name in HOOKS.names if (found := fault(name)) is not None]
    if faults:
        raise ConfigurationError(
            f"Megatron-Bridge {version}: {'; '.join(faults)}; DIP is tested with {HOOKS.seen}: install that, or use "
            "schedule off"
        )
    if numbers_of(version) != TESTED:
        tell(f"Megatron-Bridge {version} has all that DIP hooks into; DIP is tested with {HOOKS.seen}")


def check_bridge(config: Any, schedule: str) -> None:
    """Raises ConfigurationError with the setting, the reason and a way out. ``config`` is a validated
    ``ConfigContainer``."""
    for setting, reason, way_out in refusals(config):
        raise ConfigurationError(f"schedule {schedule} and {setting}: {reason}; {way_out}, or use schedule off")


def refusals(config: Any) -> list[tuple[str, str, str]]:
    """What DIP can't run of a ``ConfigContainer``: setting, reason and way out of each."""
    return [(setting, reason, way_out) for unfit, setting, reason, way_out in _refusals(config) if unfit]


def parallel_of(config: Any) -> Parallel:
    """Parallel sizes of a ``ConfigContainer``."""
    model = config.model
    return Parallel(
        model.tensor_model_parallel_size, model.pipeline_model_parallel_size, getattr(config, "data_parallel_size", 1),
        model.sequence_parallel, config.ddp.use_distributed_optimizer, model.context_parallel_size,
        model.expert_model_parallel_size or 1, model.expert_tensor_parallel_size or 0,
        bool(getattr(model, "num_moe_experts", None)) and counts_over_iteration(model),
    )  # fmt: skip


_SHARING = (
    "Qwen3VLModelProvider", "Qwen3VLMoEModelProvider", "Qwen35VLModelProvider", "Qwen35VLMoEModelProvider",
    "KimiK25VLModelProvider", "Ministral3ModelProvider", "Qwen25OmniModelProvider", "Qwen3OmniModelProvider",
)  # fmt: skip
"""Bridge's providers of models whose pages say that their class ``shares``."""


def _shares(model: Any) -> bool:
    """Whether it is one of these, or of a class made from one."""
    return any(kind.__name__ in _SHARING for kind in type(model).__mro__)


def _refusals(config: Any) -> list[tuple[Any, str, str, str]]:
    from megatron.training.models.base import ModelConfig

    model, checkpoint = config.model, config.checkpoint
    if isinstance(model, ModelConfig):
        kind = type(model).__name__
        return [(True, f"model {kind}", "untried with models that are no providers", "take the model's provider")]
    pipeline, context = model.pipeline_model_parallel_size, model.context_parallel_size
    files = checkpoint.save or checkpoint.load or checkpoint.pretrained_checkpoint
    sharded = config.dist.use_megatron_fsdp or config.dist.use_torch_fsdp2 or config.ddp.use_megatron_fsdp
    restarts = config.inprocess_restart is not None and config.inprocess_restart.enabled
    leave = "leave it out"
    return [
        (pipeline < 2, f"pipeline_model_parallel_size {pipeline}", "there is no pipeline to schedule", "use 2 or more"),
        (context > 1 and not _shares(model), f"context_parallel_size {context}",
         f"the class of a {type(model).__name__} isn't among those of Bridge's that share merged sequences on every "
         "stage by themselves", "use tensor parallelism with sequence_parallel"),
        *(expert_refusals(model, parallel_of(config)) if getattr(model, "num_moe_experts", None) else ()),
        (sharded, "FSDP", "it gathers parameters in one fixed order of layers", "use ddp.use_distributed_optimizer"),
        (getattr(model, "defer_embedding_wgrad_compute", False), "defer_embedding_wgrad_compute",
         "DIP defers weight gradients by plan", leave),
        (type(config.peft).__name__ == "VLMLoRA", "peft VLMLoRA", "it freezes parts of a rank's first chunk only",
         "use LoRA"),
        (config.dist.use_decentralized_pg, "use_decentralized_pg",
         "DIP asks Megatron-Core's parallel state for its ranks", leave),
        (restarts, "inprocess_restart", "DIP's threads and planner would outlive the restart", "restart the job"),
        (files and checkpoint.ckpt_format != "torch_dist", f"ckpt_format {checkpoint.ckpt_format}",
         "its files hold layers by their place on a rank, which DIP's partition changes", "use torch_dist"),
        (checkpoint.non_persistent_ckpt_type == "local", "non_persistent_ckpt_type local",
         "local checkpoints hold layers by their place on a rank, which DIP's partition changes", "use global"),
    ]  # fmt: skip
