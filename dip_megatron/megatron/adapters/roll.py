"""ROLL's Megatron strategy of an actor that trains, whose models are ``mcore_adapter``'s.

Its settings are its own, so that the environment (or the YAML file) asks for DIP. The model that trains runs under DIP,
also where log probabilities are computed with it; those of other strategies (a reference) run as without. Microbatches
are seen when the strategy calls the schedule with them, and are planned then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...compat.mcore_adapter import TOPIC, chunks_of, follow, mark
from ...compat.names import fault
from ...compat.roll import HOOKS
from ...describe.files import ConfigurationError
from ...environment import load_settings
from ..switched_off import switch_off
from .layout import GivenLayout
from .loop import Target

if TYPE_CHECKING:
    from ...config import DipConfig
    from ...describe.model import Partition
    from ..runs import Runs
    from .generic import GenericLoop

_STRATEGY = "roll.distributed.strategy.megatron_strategy"
_FACTORY = "mcore_adapter.models.model_factory"
_CONVERTER = "mcore_adapter.models.converter.dist_converter"
_CONFIG = "mcore_adapter.models.model_config"
_LAYOUT = (
    "virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout", "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage", "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)  # fmt: skip
PARTITION = "dip_partition.json"
"""Beside the files of a checkpoint: layers of each module, ``[segment][rank]``."""


def check_names() -> None:
    """Raises ConfigurationError if ROLL has not all that DIP hooks into."""
    faults = [found for topic in (HOOKS, TOPIC) for name in topic.names if (found := fault(name)) is not None]
    if faults:
        raise ConfigurationError(
            f"this ROLL is one that DIP doesn't know: {'; '.join(faults)}; DIP is tested with {HOOKS.seen}: take that, "
            "or use schedule off"
        )


def refusals(strategy: Any) -> list[tuple[str, str, str]]:
    """What DIP can't run of a strategy: setting, reason and way out of each."""
    args, worker = strategy.megatron_train_args, strategy.worker_config
    pipeline, context = args.pipeline_model_parallel_size or 1, args.context_parallel_size or 1
    found = [
        (pipeline < 2, f"pipeline_model_parallel_size {pipeline}", "there is no pipeline to schedule", "use 2 or more"),
        (context > 1, f"context_parallel_size {context}", "models of mcore_adapter are untried on shares of sequences",
         "use tensor parallelism"),
        (strategy.enable_router_replay, "router_replay", "it numbers layers by stages, which chunks share out "
         "otherwise", "set its mode to disabled"),
        (args.compile_warmup, "compile_warmup", "it calls stages by themselves, of which chunks can't be run without a "
         "plan", "leave it out"),
        (worker.model_args.lora_target is not None, "lora_target",
         "adapters are put into the first of a rank's chunks alone", "train all parameters"),
    ]  # fmt: skip
    return [(setting, reason, way_out) for unfit, setting, reason, way_out in found if unfit]


def take_layout(config: Any) -> GivenLayout | None:
    """What a model's config asks for, and no longer does: chunks are DIP's. By then ROLL has told Megatron-Core of its
    virtual stages."""
    from megatron.core import parallel_state

    given = tuple(name for name in _LAYOUT if getattr(config, name, None) not in (None, False))
    for name in given:
        setattr(config, name, False if name.startswith("account_for") else None)
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
    return GivenLayout(given, ()) if given else None


class Roll:
    """See :class:`.loop.LoopAdapter`."""

    def __init__(self, runs: Runs):
        self._runs = runs
        self._waiting: tuple[Any, DipConfig] | None = None
        self._targets = {
            _STRATEGY: (
                Target("MegatronTrainStrategy.initialize", self._initialize, "starting DIP"),
                Target("MegatronTrainStrategy.save_checkpoint", self._save, "checkpoints of ROLL's"),
                Target("MegatronTrainStrategy.load_checkpoint", self._load, "checkpoints of ROLL's"),
            ),
            _FACTORY: (Target("VirtualModels.__init__", self._build, "models of mcore_adapter"),),
            _CONVERTER: (Target("DistConverter.__init__", self._converter, "weights of mcore_adapter's models"),),
            _CONFIG: (Target("PretrainedConfig.save_pretrained", self._save_config, "checkpoints of ROLL's"),),
        }  # fmt: skip

    def wanted(self, module: str) -> bool:
        return module in self._targets

    def targets(self, module: ModuleType) -> Sequence[Target]:
        return self._targets[module.__name__]

    def _initialize(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def initialize(strategy: Any, *args: Any, **kwargs: Any) -> Any:
            config = load_settings({}).config
            if not config.on:
                return original(strategy, *args, **kwargs)
            check_names()
            for setting, reason, way_out in refusals(strategy):
                raise ConfigurationError(
                    f"dip: schedule {config.schedule} and {setting}: {reason}; {way_out}, or use schedule off"
                )
            self._waiting = (strategy, config)
            try:
                return original(strategy, *args, **kwargs)
            finally:
                self._waiting = None

        return initialize

    def _build(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def build(models: Any, cls: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            if self._waiting is None:
                original(models, cls, config, *args, **kwargs)
                return
            (strategy, settings), self._waiting = self._waiting, None
            folder = str(config.name_or_path)
            if (Path(folder) / "mca_config.json").exists():
                raise ConfigurationError(
                    f"dip: {folder} has files of mcore_adapter's own, which hold layers by their place on a rank; "
                    "start from a Hugging Face folder (save_hf_model writes one), or use schedule off"
                )
            from megatron.core import parallel_state

            from ...families.multimodal.roll_models import ROLL_FAMILIES
            from ...families.shared.shapes import LANGUAGE

            self._runs.add_families(ROLL_FAMILIES)
            for line in switch_off(config):
                self._runs.tell(line)
            loop, held = self._loop(strategy, config)
            chunks = self._runs.begin(loop, settings).segmented(partial(cls, config))(*args, **kwargs)
            mark(config, chunks, held[LANGUAGE], parallel_state.get_pipeline_model_parallel_rank())
            # What the strategy sets on its model's config, schedules look for on the first chunk's.
            models.models, models.config = list(chunks), chunks[0].config
            strategy.dip_layers = held

        return build

    def _loop(self, strategy: Any, config: Any) -> tuple[GenericLoop, dict[str, tuple[tuple[int, ...], ...]]]:
        """The run, and what will be known of layers once its chunks are chosen."""
        from .generic import GenericLoop

        held: dict[str, tuple[tuple[int, ...], ...]] = {}

        class RollLoop(GenericLoop):
            def record(self, chunks: Partition) -> str | None:
                assert not chunks.mixed, "its families build no others"
                held.update({part.module: part.layers for part in chunks.modules})
                return None

        args, worker = strategy.megatron_train_args, strategy.worker_config
        alone = strategy.use_sequence_packing or worker.use_dynamic_batching_in_train
        loop = RollLoop(
            sequence_parallel=config.sequence_parallel, distributed_optimizer=args.use_distributed_optimizer,
            micro_batch_size=1 if alone else worker.training_args.per_device_train_batch_size,
            num_microbatches=max(1, worker.training_args.gradient_accumulation_steps), seed=args.seed,
            layout=take_layout(config), finalizes=True,
        )  # fmt: skip
        return loop, held

    @staticmethod
    def _converter(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(converter: Any, mca_config: Any, *args: Any, **kwargs: Any) -> None:
            follow(converter, mca_config)
            original(converter, mca_config, *args, **kwargs)

        return init

    @staticmethod
    def _save_config(original: Callable[..., Any]) -> Callable[..., Any]:
        def save_pretrained(config: Any, save_directory: Any) -> Any:
            """The whole model's, of chunks' too."""
            told = chunks_of(config)
            return original(config if told is None else told.whole, save_directory)

        return save_pretrained

    @staticmethod
    def _save(original: Callable[..., Any]) -> Callable[..., Any]:
        def save_checkpoint(strategy: Any, save_dir: Any, *args: Any, **kwargs: Any) -> Any:
            """What chunks are goes with them, before ROLL uploads the folder."""
            import torch.distributed as dist

            layers = getattr(strategy, "dip_layers", None)
            if layers is not None and dist.get_rank() == 0:
                Path(save_dir).mkdir(parents=True, exist_ok=True)
                (Path(save_dir) / PARTITION).write_text(json.dumps(layers))
            return original(strategy, save_dir, *args, **kwargs)

        return save_checkpoint

    @staticmethod
    def _load(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_checkpoint(strategy: Any, load_dir: Any, *args: Any, **kwargs: Any) -> Any:
            check_partition(Path(load_dir), getattr(strategy, "dip_layers", None))
            return original(strategy, load_dir, *args, **kwargs)

        return load_checkpoint


def check_partition(folder: Path, layers: Mapping[str, tuple[tuple[int, ...], ...]] | None) -> None:
    """Raises ConfigurationError if a checkpoint is of chunks with other ``layers`` than this run's (None: a run without
    DIP): its files hold layers by their place in a rank's chunks."""
    file = folder / PARTITION
    written = json.loads(file.read_text()) if file.exists() else None
    here = None if layers is None else json.loads(json.dumps(dict(layers)))
    if written == here:
        return
    if written is None:
        raise ConfigurationError(
            f"dip: {folder} was written without DIP, whose stages have other layers than chunks; start from its "
            "Hugging Face files (save_hf_model), or use schedule off"
        )
    given = json.dumps({name: {"layers": lines} for name, lines in written.items()})
    raise ConfigurationError(
        f"dip: {folder} was written under DIP by chunks with other layers; set DIP_SCHEDULE and DIP_MODULES='{given}'"
    )
