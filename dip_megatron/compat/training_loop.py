"""Where DIP hooks into Megatron: functions that are wrapped, all looked up when they are called."""

from __future__ import annotations

from .names import Name, Topic

CORE = Topic(
    "the schedule, in whatever loop asks Megatron-Core for it",
    "megatron-core",
    "0.16.1, 0.19.2",
    "no loop gets DIP's schedule",
    (Name("megatron.core.pipeline_parallel.schedules:get_forward_backward_func"),),
)
TOPIC = Topic(
    "flags, models and checkpoints of megatron.training",
    "megatron.training",
    "0.19.2",
    "--dip-schedule doesn't work in full",
    (
        Name("megatron.training.arguments:add_megatron_arguments", ("parser",)),
        Name("megatron.training.arguments:validate_args", ("args",)),
        Name("megatron.training.training:get_model", ("model_provider_func",)),
        Name("megatron.training.training:save_grads", ("save_dir", "state_dict"), first="0.19"),
        Name("megatron.training.checkpointing:generate_state_dict"),
        Name("megatron.training.checkpointing:maybe_save_dataloader_state", ("train_iterator",)),
        Name("megatron.training.global_vars:get_tensorboard_writer", ()),
        Name("megatron.training.global_vars:get_wandb_writer", ()),
        # From 0.19 on scripts may give a model's config instead of a provider.
        Name("megatron.training.models.dist_utils:build_virtual_pipeline_stages", first="0.19"),
        Name(
            "megatron.training.models.dist_utils:prepare_existing_model_chunks_for_distributed_training", first="0.19"
        ),
    ),
)
