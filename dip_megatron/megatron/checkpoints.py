"""Checkpoints under DIP: Megatron's own, so that any schedule, partition and pipeline size loads them.

Chunks have Megatron's parameter names and global layer numbers, so their sharded state dicts need nothing from us. What
is added here: the partition travels in the saved arguments, a run that resumes keeps it, and state that only the very
same chunks could read is refused before anything is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from ..compat.checkpointing import fully_reshardable, read_head
from ..describe.files import ConfigurationError
from ..describe.model import LayerRun, ModelError, ModulePartition, MultimodalModel, Partition
from ..schedulers.static import static_choice

_RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"


@dataclass(frozen=True)
class Checkpoint:
    """What is known of the checkpoint at ``path`` before a model is built from it.

    ``partition`` is the one it was written under, or ``stages`` the mixed chunks; both None if they were not DIP's.
    ``resumes``: the run goes on with its optimizer. ``bound``: optimizer state is stored by place in the buffers of the
    chunks that wrote it. ``by_place``: so are the weights (``--ckpt-format torch``).
    """

    path: str
    partition: Partition | None
    resumes: bool
    bound: bool
    by_place: bool = False
    stages: Partition | None = None

    def stages_for(self, schedule: str, model: MultimodalModel) -> Partition | None:
        """The mixed chunks to go on with under the same schedule; None if there are none, or not for this many
        ranks."""
        stages = self.stages
        if stages is None or not self.resumes or stages.schedule != schedule:
            return None
        return stages if stages.ranks == model.parallel.pp else None

    def partition_for(self, model: MultimodalModel) -> Partition | None:
        """The partition to go on with; None if there is none, or it doesn't cut ``model`` over this many ranks."""
        if self.partition is None or not (self.resumes or self.by_place):
            return None
        try:
            self.partition.check(model)
        except ModelError:
            return None
        return self.partition

    def compare(self, chunks: Partition) -> str | None:
        """What the chosen chunks mean for loading, in a sentence; None if there is nothing to say.

        Raises ConfigurationError if weights or the optimizer's state can't be loaded into other chunks.
        """
        before = self.partition or self.stages
        if before is not None and _layers(before) == _layers(chunks):
            return None
        if not (self.resumes or self.by_place):
            return None
        written = "without DIP" if before is None else f"with {_in_words(before)}"
        if self.by_place:
            raise ConfigurationError(
                f"the checkpoint in {self.path} was written {written}, this run has {_in_words(chunks)}, and files "
                "of --ckpt-format torch hold layers by their place on a rank; save it with --ckpt-format torch_dist "
                "first, or give the same layers in --dip-config, or use --dip-schedule off"
            )
        if self.bound:
            raise ConfigurationError(
                f"the checkpoint in {self.path} was written {written}, this run has {_in_words(chunks)}, and its "
                f"distributed optimizer's state can only be loaded into the chunks that wrote it; write it with "
                f"{_RESHARDABLE}, or give the same layers in --dip-config, or use --no-load-optim"
            )
        if before is None:
            return None
        return f"the checkpoint in {self.path} was written {written}; this run has {_in_words(chunks)}"


def find_checkpoint(args: Any, checkpointing: Any) -> Checkpoint | None:
    """The checkpoint that Megatron is going to load, if any. Call it on all ranks, with torch.distributed initialized.
    ``checkpointing`` is Megatron's module of that name.

    Raises ConfigurationError for a checkpoint of a format whose chunks can't be known again.
    """
    folder, finetune = args.load, args.finetune
    pretrained = getattr(args, "pretrained_checkpoint", None)
    if pretrained is not None and not checkpointing.checkpoint_exists(folder):
        folder, finetune = pretrained, True
    if folder is None:
        return None
    state, path, release, layout = read_head(checkpointing, folder, args)
    if state is None:
        return None
    saved = state.get("args")
    partition, stages = recorded(saved)
    by_place = layout == "by place"
    if layout != "distributed" and not (by_place and partition is not None):
        raise ConfigurationError(
            f"{path or folder} is no distributed checkpoint, and not one of DIP's: its files hold layers by their "
            "place on a rank, which DIP's partition changes; convert it first (the run that wrote it, with "
            "--dip-schedule off, --ckpt-convert-format torch_dist and --ckpt-convert-save FOLDER), or use "
            "--dip-schedule off"
        )
    metadata = state.get("content_metadata") or {}
    sharding = metadata.get("distrib_optim_sharding_type")
    resumes = not (finetune or release)
    loads_optimizer = resumes and not args.no_load_optim and not getattr(saved, "no_save_optim", False)
    return Checkpoint(
        str(folder),
        partition,
        resumes,
        bound=loads_optimizer
        and args.use_distributed_optimizer
        and sharding is not None
        and not fully_reshardable(sharding),
        by_place=by_place,
        stages=stages,
    )


def record(args: Any, chunks: Partition) -> None:
    """Have every checkpoint of the run carry its chunks, as plain data: Megatron saves ``args``."""
    args.dip_partition = args.dip_stages = None
    if not chunks.mixed:
        args.dip_partition = {
            m.module: {
                "layers": [list(line) for line in m.layers],
                "unit_size": m.unit_size,
                "replicated": m.replicated,
            }
            for m in chunks.modules
        }
        return
    (part,) = chunks.modules
    args.dip_stages = {
        "name": chunks.schedule, "segments": part.segments, "turned": bool(part.reversed), "group": chunks.group,
        "stages": [[asdict(run) for run in stage] for stage in part.stages],
    }  # fmt: skip


def warn_of_bound_state(args: Any) -> str | None:
    """A sentence if this run saves what no other partition can load."""
    if args.save is None:
        return None
    if args.ckpt_format == "torch":
        return (
            "checkpoints of this run (--ckpt-format torch) can be loaded under this very partition only; use "
            "--ckpt-format torch_dist to be free of it"
        )
    if not args.use_distributed_optimizer or getattr(args, "no_save_optim", False):
        return None
    if getattr(args, "dist_ckpt_optim_fully_reshardable", False):
        return None
    return (
        f"checkpoints of this run can go on with their optimizer state under this very partition only; add "
        f"{_RESHARDABLE} to be free of it"
    )


def share_step(state: dict[str, Any]) -> None:
    """Put the optimizers' step into every rank's state, ``state`` being what Megatron is about to save.

    Megatron saves what is not sharded as the first rank has it, and takes the step from that rank's parameters. Under
    DIP the first rank may have none to train: with everything but the projector frozen, which stands on the last one.
    A distributed optimizer's state in Megatron's default format is each rank's own, step and all, and stays as it is.
    Call it on all ranks.
    """
    optimizer = state.get("optimizer", {})
    several = [part for key, part in optimizer.items() if isinstance(key, int)]
    inner = [part.get("optimizer", part) for part in several or [optimizer]]
    known = [_step(part) for part in inner]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, known)
    for index, part in enumerate(inner):
        found = [steps[index] for steps in everyone if index < len(steps) and steps[index] is not None]
        if not found or known[index] is not None:
            continue
        in_groups, step = found[0]
        if in_groups:
            for group in part["param_groups"]:
                group["step"] = step
        else:
            part["state"]["common_step"] = step


def _step(optimizer: Any) -> tuple[bool, Any] | None:
    """Where an optimizer's state has its step (in its parameter groups, or apart), and the step."""
    if not isinstance(optimizer, Mapping):  # packed as one object
        return None
    if "common_step" in optimizer.get("state", {}):
        return False, optimizer["state"]["common_step"]
    groups = optimizer.get("param_groups", [])
    steps = [group["step"] for group in groups if group.get("step") is not None] if isinstance(groups, list) else []
    return (True, steps[0]) if steps else None


def recorded(saved: Any) -> tuple[Partition | None, Partition | None]:
    """What :func:`record` has put into ``saved``: the partition, or the mixed chunks, or neither."""
    return _recorded(getattr(saved, "dip_partition", None)), _recorded_stages(getattr(saved, "dip_stages", None))


def _recorded(entry: Mapping[str, Any] | None) -> Partition | None:
    if not entry:
        return None
    return Partition(
        tuple(
            ModulePartition(
                name, tuple(tuple(line) for line in m["layers"]), m["unit_size"], m.get("replicated", False)
            )
            for name, m in entry.items()
        )
    )


def _recorded_stages(entry: Mapping[str, Any] | None) -> Partition | None:
    if not entry:
        return None
    stages = tuple(tuple(LayerRun(**run) for run in stage) for stage in entry["stages"])
    ranks = len(stages) // entry["segments"]
    return static_choice(entry["name"], stages, ranks, turned=entry["turned"], group=entry["group"])


def _layers(chunks: Partition) -> object:
    """Equal where the chunks are."""
    return {m.module: (m.layers, m.runs, m.reversed) for m in chunks.modules}


def _in_words(chunks: Partition) -> str:
    if chunks.mixed:
        return chunks.explain()
    partition = chunks
    return ", ".join(f"{m.module} layers {[list(line) for line in m.layers]}" for m in partition.modules)
