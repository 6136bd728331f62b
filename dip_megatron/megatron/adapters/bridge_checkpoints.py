"""Which chunks a run of Megatron-Bridge's wrote a checkpoint under.

Bridge saves no arguments of DIP's, so the state that it saves says so: the optimizer's may be stored by place in the
buffers of those chunks, which another run that saves to the same folder may have cut otherwise.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...describe.model import Partition
    from ..checkpoints import Checkpoint

_FREE = "checkpoint.dist_ckpt_optim_fully_reshardable"


def find_bridge_checkpoint(config: Any) -> Checkpoint | None:
    """The checkpoint that Bridge is going to load by ``checkpoint.load``, if any, of a ``ConfigContainer``."""
    from ...compat.bridge import loaded_checkpoint
    from ...compat.checkpointing import fully_reshardable
    from ..checkpoints import Checkpoint, recorded

    found = loaded_checkpoint(config.checkpoint)
    if found is None:
        return None
    folder, state = found
    partition, stages = recorded(SimpleNamespace(**state))
    sharding = (state.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    resumes = not config.checkpoint.finetune
    bound = resumes and config.checkpoint.load_optim and config.optimizer.use_distributed_optimizer
    return Checkpoint(
        folder, partition, resumes, bound and sharding is not None and not fully_reshardable(sharding), stages=stages
    )


def state_of(chunks: Partition) -> dict[str, Any]:
    """What :func:`find_bridge_checkpoint` finds again, as plain data for the state of every checkpoint."""
    from ..checkpoints import record

    held = SimpleNamespace()
    record(held, chunks)
    return vars(held)


def warn_of_bound_state(config: Any) -> str | None:
    """A sentence if this run saves an optimizer's state that no other partition can load."""
    if config.checkpoint.save is None or not config.optimizer.use_distributed_optimizer:
        return None
    if config.checkpoint.dist_ckpt_optim_fully_reshardable:
        return None
    return (
        "checkpoints of this run can go on with their optimizer state under this very partition only, which they "
        f"carry; set {_FREE} to be free of it"
    )
