"""Megatron's checkpoints before they are loaded: what they were written with."""

from __future__ import annotations

from typing import Any, Literal

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from .names import Name, Topic

TOPIC = Topic(
    "checkpoints that go on with their partition",
    "megatron.training",
    "0.19.2",
    "no run can go on from a checkpoint under DIP",
    (
        Name("megatron.training.checkpointing:_load_base_checkpoint", ("load_dir", "args", "*", "rank0")),
        Name("megatron.training.checkpointing:checkpoint_exists", ("checkpoints_path",)),
        Name("megatron.training.checkpointing:CheckpointType.GLOBAL"),
        Name("megatron.training.checkpointing:CheckpointType.LEGACY"),
        Name(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.checkpoint_fully_reshardable_formats"
        ),
    ),
)  # fmt: skip


Layout = Literal["distributed", "by place", "other"]
"""How a checkpoint's files hold a model: any chunks can read it, or only those on the same place of the same rank."""


def read_head(checkpointing: Any, folder: str, args: Any) -> tuple[dict[str, Any] | None, str, bool, Layout]:
    """What every rank finds of the checkpoint in ``folder`` without building a model: its common state (None if there
    is no checkpoint), its path, whether it is a release, and its layout. ``checkpointing`` is Megatron's module of that
    name."""
    state, path, release, kind = checkpointing._load_base_checkpoint(folder, args, rank0=True)
    types = checkpointing.CheckpointType
    known: dict[Any, Layout] = {types.GLOBAL: "distributed", types.LEGACY: "by place"}
    return state, path, release, known.get(kind, "other")


def fully_reshardable(sharding: str) -> bool:
    """Whether optimizer state that was written in this way can be loaded into other chunks."""
    return sharding in DistributedOptimizer.checkpoint_fully_reshardable_formats
