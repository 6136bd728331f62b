"""Which chunks a run of Megatron-Bridge's wrote its checkpoints under.

Bridge saves nothing of DIP's, so a file beside the checkpoints says so: the optimizer's state may be stored by place in
the buffers of those chunks.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ...describe.files import ConfigurationError

if TYPE_CHECKING:
    from ...planner.live import Chunks
    from ..checkpoints import Checkpoint

NAME = "dip_chunks.json"
_FREE = "checkpoint.dist_ckpt_optim_fully_reshardable"


def find_bridge_checkpoint(config: Any) -> Checkpoint | None:
    """The checkpoint that Bridge is going to load by ``checkpoint.load``, if any, of a ``ConfigContainer``."""
    from ...compat.bridge import loaded_checkpoint
    from ...compat.checkpointing import fully_reshardable
    from ..checkpoints import Checkpoint, recorded

    found = loaded_checkpoint(config.checkpoint)
    if found is None:
        return None
    folder, sharding = found
    file = Path(folder).parent / NAME
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise ConfigurationError(
            f"{file}: {error}; restore it, or take it away and say the layers of each module in --dip-config"
        ) from error
    partition, stages = recorded(None if known is None else SimpleNamespace(**known))
    resumes = not config.checkpoint.finetune
    bound = resumes and config.checkpoint.load_optim and config.optimizer.use_distributed_optimizer
    return Checkpoint(
        folder, partition, resumes, bound and sharding is not None and not fully_reshardable(sharding), stages=stages
    )


def record_beside(config: Any, chunks: Chunks, first: bool) -> str | None:
    """Write down the chunks where the run is going to save, on the ``first`` rank; a sentence if there is something to
    say of them. Collective over all ranks: each has read what may stand there of the run that it goes on with."""
    import torch.distributed as dist

    from ..checkpoints import record

    folder = config.checkpoint.save
    if folder is None:
        return None
    held = SimpleNamespace()
    record(held, chunks)
    if dist.is_initialized():
        dist.barrier()
    if first:
        file = Path(folder) / NAME
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            whole = file.with_suffix(".new")  # a run that dies here leaves the old one
            whole.write_text(json.dumps(vars(held)) + "\n", encoding="utf-8")
            whole.replace(file)
        except OSError as error:
            return f"can't write {NAME} to {folder} ({error}): a run that resumes may choose another partition"
    if not config.optimizer.use_distributed_optimizer or config.checkpoint.dist_ckpt_optim_fully_reshardable:
        return None
    return (
        f"checkpoints of this run can go on with their optimizer state under this very partition only, which {NAME} "
        f"beside them says; set {_FREE} to be free of it"
    )
