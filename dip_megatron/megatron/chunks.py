"""Which chunks a run holds: as its configuration, a plan file or a checkpoint say, or chosen for its schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from ..config import DipConfig
from ..describe.cost import Cluster, Costs, load_cluster
from ..describe.files import ConfigurationError
from ..describe.model import ModulePartition, MultimodalModel, Partition
from ..describe.workload import load_workload
from ..families.family import ModelFamily
from ..planner.facade import Setting, searched_partition
from ..planner.from_file import PlanFile
from ..planner.partitioning import Given, NoPartitionError
from ..schedulers.entry import ScheduleEntry
from .adapters.loop import LoopSettings
from .build import configured_partition, given_parts, placements
from .checkpoints import Checkpoint
from .device import cluster_here, device_name
from .mixed import configured_choice, tuned_choice

# Seconds to search a partition for, before the model is built.
_PARTITION_SECONDS = 5.0


def cluster_of(config: DipConfig, tell: Callable[[str], object]) -> Cluster:
    """The cluster whose published rates price what isn't measured: as configured, or by the device here."""
    return cluster_here(tell) if config.cluster == "auto" else load_cluster(config.cluster)


def costs_of(config: DipConfig, tell: Callable[[str], object]) -> Costs | None:
    """What was measured, if the configuration has a file of it. One of another device is taken, and ``tell`` is told:
    partition and first plans go by it, and what memory a rank may use, which no measured time corrects."""
    if config.costs is None:
        return None
    costs, here = Costs.load(config.costs), device_name()
    if costs.device not in ("", here) and not costs.device.startswith("cuda"):  # older files name no GPU
        tell(
            f"{config.costs}: measured on {costs.device}, while ranks compute on {here}; the partition and the first "
            "plans go by it all the same. `dip profile` measures here"
        )
    return costs


def unlike_the_loop(model: MultimodalModel) -> str | None:
    """What the loop's own classes get wrong and DIP doesn't, so that nobody need look for it; None for nothing."""
    taps = [m.name for m in model.modules if m.taps and m.trainable]
    if not taps or not model.parallel.sequence_parallel or model.parallel.tp == 1:
        return None
    return (
        f"{taps[0]}: its gradients have what deepstack gives to all ranks' parts of a sequence, which those of "
        "Megatron-Bridge and mcore-bridge lack with sequence parallelism: norms and later losses differ from those "
        "without DIP (docs/with-megatron-bridge.md)"
    )


def _agree(settled: Mapping[str, Given], part: ModulePartition) -> bool:
    """Whether a module's layers stand where the configuration says, if it says so."""
    given = settled.get(part.module, Given())
    return given.layers is None or (given.layers == part.layers and not part.replicated)


@dataclass(frozen=True)
class ChunkChoice:
    """What the chunks of a run are chosen by; ``tell`` takes the sentences about it, on every rank."""

    settings: LoopSettings
    config: DipConfig
    entry: ScheduleEntry
    file: PlanFile | None
    tell: Callable[[str], object]

    def chunks(
        self, model: MultimodalModel, cluster: Cluster, costs: Costs | None, family: ModelFamily,
        checkpoint: Checkpoint | None,
    ) -> Partition:  # fmt: skip
        """As configured, or those of the plan file, or of the checkpoint to go on from, or chosen for the schedule.
        The same on all ranks, which all have to ask.

        Raises ConfigurationError for settings that don't fit the model or the schedule.
        """
        mixed = self.entry.mixed is not None
        settled = {} if mixed else given_parts(model, self.config)
        given: Partition | None
        if mixed:
            given = configured_choice(self.entry, model, self.config)
        else:
            given = configured_partition(model, self.config)
        if given is None and self.file is not None and (not mixed or len(model.modules) == 1):
            chosen = self.file.partition(model)
            for part in chosen.modules:
                if not _agree(settled, part):
                    raise ConfigurationError(
                        f"--dip-config: modules.{part.module}: the plan file has layers {part.layers}; leave them out, "
                        "or plan with others"
                    )
            return chosen
        if given is None and not mixed:
            given = self._layout(model)
        if given is None and checkpoint is not None:
            given = checkpoint.stages_for(self.entry.name, model) if mixed else checkpoint.partition_for(model)
            if given is not None and not mixed:
                kept = all(_agree(settled, part) for part in given.modules)
                parts = tuple(settled.get(part.module, Given()).within(part) for part in given.modules)
                given = replace(given, modules=parts) if kept else None
            if given is not None:
                self.tell(f"going on with the checkpoint's partition:\n{given.explain()}")
        if given is None:
            given = self._chosen(model, cluster, costs, family)
        return given.by_module(model) or given

    def _layout(self, model: MultimodalModel) -> Partition | None:
        """The layout that the loop's own settings give, where it says all of the partition: a model of one module."""
        layout = self.settings.layout
        if layout is None or self.config.override:
            return None
        if len(model.modules) > 1:
            self.tell(
                f"{layout} lay out one of {len(model.modules)} modules: DIP's partition of all of them replaces it (as "
                "with --dip-override; modules.NAME.layers in --dip-config fixes layers)"
            )
            return None
        partition = Partition((ModulePartition(model.modules[0].name, layout.layers, None),))
        partition.check(model)
        self.tell(f"{model.modules[0].name}: layers {layout.layers}, as {layout} say")
        return partition

    def _chosen(self, model: MultimodalModel, cluster: Cluster, costs: Costs | None, family: ModelFamily) -> Partition:
        """On one rank, because a search may be timed."""
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                found = [self._search(model, cluster, costs, family)]
            except Exception as error:  # told to all ranks, which would otherwise wait
                found = [error]
        dist.broadcast_object_list(found, 0)
        if isinstance(found[0], Exception):
            raise found[0]
        chunks: Partition = found[0]
        if not chunks.mixed:
            for m in chunks.modules:
                place = "on every rank" if m.replicated else f"layers {m.layers}"
                self.tell(f"{m.module}: {place}, sub-microbatches of {m.unit_size or 'all'}")
        else:
            self.tell(chunks.explain())
        return chunks

    def _search(self, model: MultimodalModel, cluster: Cluster, costs: Costs | None, family: ModelFamily) -> Partition:
        """Chunks are built before the first batch is read, so they are judged by a published mix, packed to the model's
        sequence length."""
        config = self.config
        batches = load_workload(family.workload, model, 2, self.settings.num_microbatches, self.settings.seed)
        setting = Setting(
            model, cluster, batches, costs, config.memory_limit, recompute=config.recompute, offload=config.offload,
            placements={} if self.settings.adapts else placements(model, config, family),
            given=given_parts(model, config) if self.entry.mixed is None else {},
        )  # fmt: skip
        if self.entry.mixed is not None:
            return tuned_choice(self.entry, setting)
        try:
            return searched_partition(setting, _PARTITION_SECONDS)
        except NoPartitionError as error:
            limit, said = config.memory_limit or cluster.usable_bytes, config.memory_limit is not None
            source = "memory_limit" if said else cluster.name
            raise ConfigurationError(f"{error}. A rank has {limit / 1e9:g} GB, by {source}") from error
