"""ROLL's Megatron strategy from the inside."""

from __future__ import annotations

from .names import Name, Topic

_STRATEGY = "roll.distributed.strategy.megatron_strategy:MegatronTrainStrategy"
HOOKS = Topic(
    "hooks in ROLL's Megatron strategy",
    "roll",
    "ROLL at 8eb27cc",
    "ROLL's Megatron strategy can't run under DIP",
    (
        Name(f"{_STRATEGY}.initialize", ("model_provider",)),
        Name(f"{_STRATEGY}.save_checkpoint", ("save_dir",)),
        Name(f"{_STRATEGY}.load_checkpoint", ("load_dir",)),
        Name(_STRATEGY, has=("megatron_train_args", "worker_config", "use_sequence_packing", "enable_router_replay")),
    ),
)
