"""ms-swift's Megatron trainer, whose models are mcore-bridge's.

Its flags are its own, so that the environment (or the YAML file) asks for DIP. Another loop with mcore-bridge's models
goes through ``dip_megatron.build_model``; their weights go in and out of DIP's chunks there, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...compat.ms_swift import HOOKS, TESTED, adapters_of, swift_version
from ...compat.names import fault
from ...compat.releases import numbers_of
from ...describe.files import ConfigurationError
from ...describe.model import Parallel
from ...environment import load_settings
from ..switched_off import switch_off
from .layout import GivenLayout
from .loop import LoopSettings, Target, TrainingLoop

if TYPE_CHECKING:
    from ..runs import Runs
    from ..session import DipSession

_BRIDGE = "mcore_bridge.bridge.gpt_bridge"
_TRAINER = "swift.megatron.trainers.base"
_LAYOUT = (
    "virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers", "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip


_OTHER_TARGETS = ("all-embedding", "all-router")


class SwiftLoop(TrainingLoop):
    """A run of ms-swift's trainer, by its arguments and its state, which it makes after its model."""

    def __init__(self, trainer: Any, layout: GivenLayout | None):
        args = trainer.args
        parallel = Parallel(
            args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.data_parallel_size,
            args.sequence_parallel, args.use_distributed_optimizer, args.context_parallel_size,
            args.expert_model_parallel_size, args.expert_tensor_parallel_size,
        )  # fmt: skip
        settings = LoopSettings(
            parallel,
            1 if args.padding_free else args.micro_batch_size,  # samples packed in one row
            args.num_microbatches, args.seed, args.logging_steps,
            # A stream that ends ends the training, when it is read.
            read_ahead=not args.streaming, layout=layout,
            weights_by_tokens=bool(args.calculate_per_token_loss), finalizes=True, adapts=args.tuner_type != "full",
        )  # fmt: skip
        super().__init__(settings)
        self._trainer = trainer

    def iteration(self) -> int:
        """ms-swift counts an iteration once it is done."""
        return int(self._trainer.state.iteration) + 1

    def another_follows(self) -> bool:
        return self.iteration() < int(self._trainer.args.train_iters)

    def write_scalars(self, scalars: dict[str, float], iteration: int) -> None:
        """To ms-swift's TensorBoard writer, which exists on the last rank of the job."""
        for callback in self._trainer.callbacks:
            writer = getattr(callback, "writer", None)
            if writer is not None:
                for name, value in scalars.items():
                    writer.add_scalar(name, value, iteration)


def check_release(tell: Callable[[str], object]) -> None:
    """``tell`` of a release that DIP isn't tested with. Raises ConfigurationError if it has not all that DIP hooks
    into."""
    version = swift_version()
    faults = [found for name in HOOKS.names if (found := fault(name)) is not None]
    if faults:
        raise ConfigurationError(
            f"ms-swift {version}: {'; '.join(faults)}; DIP is tested with {HOOKS.seen}: install that, or use schedule "
            "off"
        )
    if numbers_of(version) != TESTED:
        tell(f"ms-swift {version} has all that DIP hooks into; DIP is tested with {HOOKS.seen}")


def refusals(trainer: Any) -> list[tuple[str, str, str]]:
    """What DIP can't run of a trainer and its arguments: setting, reason and way out of each."""
    args, kind = trainer.args, type(trainer).__name__
    pipeline, shared = args.pipeline_model_parallel_size, args.context_parallel_size > 1
    others = [name for name in _OTHER_TARGETS if name in args.target_modules] if args.tuner_type != "full" else []
    others += ["modules_to_save"] if args.tuner_type != "full" and args.modules_to_save else []
    found = [
        (kind != "MegatronTrainer", f"trainer {kind}",
         "it may call its models by itself, of which chunks can't be run without a plan",
         "train with megatron sft or pt"),
        (args.task_type != "causal_lm", f"task_type {args.task_type}", "untried", "use causal_lm"),
        (args.bridge_backend != "mcore-bridge", f"bridge_backend {args.bridge_backend}",
         "ms-swift gives it no multimodal models", "use mcore-bridge"),
        (pipeline < 2, f"pipeline_model_parallel_size {pipeline}", "there is no pipeline to schedule", "use 2 or more"),
        (shared and args.cp_partition_mode != "zigzag", f"cp_partition_mode {args.cp_partition_mode}",
         "DIP cuts what deepstack adds as Megatron cuts sequences", "use zigzag"),
        (shared and args.sequence_packing_scheduler, f"sequence_packing_scheduler {args.sequence_packing_scheduler}",
         "with context parallelism it is untried", "leave it out"),
        (args.use_megatron_fsdp, "use_megatron_fsdp", "it gathers parameters in one fixed order of layers",
         "use the distributed optimizer"),
        (bool(others), f"{', '.join(others)} beside adapters",
         "embeddings, routers and whole layers that train beside adapters are untried",
         "use target_modules all-linear, or names of linears"),
        (args.freeze_parameters_ratio, "freeze_parameters_ratio",
         "it counts a pipeline stage's parameters, which chunks share out otherwise", "use freeze_parameters"),
        (args.mcore_model or args.mcore_adapter, "mcore_model",
         "its files number the chunks of the partition that wrote them", "start from the model's safetensors"),
    ]  # fmt: skip
    return [(setting, reason, way_out) for unfit, setting, reason, way_out in found if unfit]


def _take_layout(args: Any) -> GivenLayout | None:
    """What the arguments ask for, and no longer do: chunks are DIP's, and every rank has one data iterator. By then
    ms-swift has told Megatron-Core of its virtual stages."""
    from megatron.core import parallel_state

    given = tuple(name for name in _LAYOUT if getattr(args, name, None) not in (None, False))
    for name in given:
        setattr(args, name, False if name.startswith("account_for") else None)
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None:
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
        args.overlap_p2p_comm = args.align_param_gather = False
    return GivenLayout(given, ()) if given else None


class MsSwift:
    """See :class:`.loop.LoopAdapter`."""

    def __init__(self, runs: Runs):
        self._runs = runs
        self._session: DipSession | None = None
        self._targets = {
            _TRAINER: (
                Target("BaseMegatronTrainer.prepare_model", self._prepare, "starting DIP"),
                Target("BaseMegatronTrainer.finalize_training", self._finish, "ending DIP"),
                Target("get_mcore_model", self._get_model, "models of mcore-bridge"),
                Target("prepare_mcore_model", self._adapt, "adapters"),
            ),
            _BRIDGE: (
                Target("GPTBridge.load_weights", self._load, "weights of mcore-bridge's models"),
                Target("GPTBridge.export_weights", self._export, "weights of mcore-bridge's models"),
            ),
        }

    def wanted(self, module: str) -> bool:
        return module in self._targets

    def targets(self, module: ModuleType) -> Sequence[Target]:
        return self._targets[module.__name__]

    def _prepare(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_model(trainer: Any, *rest: Any, **kwargs: Any) -> Any:
            self._session = None
            try:
                config = load_settings({}).config
                if config.on:
                    check_release(self._runs.tell)
                    for setting, reason, way_out in refusals(trainer):
                        raise ConfigurationError(
                            f"schedule {config.schedule} and {setting}: {reason}; {way_out}, or use schedule off"
                        )
                    self._session = self._runs.begin(self._loop(trainer), config)
                return original(trainer, *rest, **kwargs)
            except ConfigurationError as error:
                sys.exit(f"dip: {error}")

        return prepare_model

    def _loop(self, trainer: Any) -> SwiftLoop:
        from ...families.multimodal.mcore_bridge_models import MCORE_BRIDGE_FAMILIES

        self._runs.add_families(MCORE_BRIDGE_FAMILIES)
        if trainer.args.vit_gradient_checkpointing:
            trainer.args.vit_gradient_checkpointing = False
            self._runs.tell("vit_gradient_checkpointing isn't followed: plans say what is recomputed")
        for line in switch_off(trainer.args):
            self._runs.tell(line)
        return SwiftLoop(trainer, _take_layout(trainer.args))

    def _get_model(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_mcore_model(args: Any, hf_config: Any, *rest: Any, **kwargs: Any) -> Any:
            if self._session is None:
                return original(args, hf_config, *rest, **kwargs)
            from megatron.core.enums import ModelType

            chunks = self._session.segmented(partial(original, args, hf_config))(*rest, **kwargs)
            chunks.model_type = ModelType.encoder_or_decoder
            for chunk in chunks:
                chunk.prepare_inputs_for_generation = None  # as mcore-bridge leaves it; PEFT looks for it
            return list(chunks)

        return get_mcore_model

    def _adapt(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_mcore_model(args: Any, model: Any, *rest: Any, **kwargs: Any) -> Any:
            if self._session is None or args.tuner_type == "full":
                return original(args, model, *rest, **kwargs)
            with adapters_of(args, model):
                return original(args, model, *rest, **kwargs)

        return prepare_mcore_model

    def _finish(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def finalize_training(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            finally:
                # ms-swift goes on to end the process groups over which DIP's ranks talk.
                if self._session is not None:
                    self._runs.end(self._session)
                    self._session = None

        return finalize_training

    @staticmethod
    def _load(original: Callable[..., Any]) -> Callable[..., Any]:
        def load_weights(bridge: Any, mg_models: Any, hf_model_dir: str, *rest: Any, **kwargs: Any) -> Any:
            from ...compat.mcore_bridge import cut_models, load_into_chunks

            chunks = cut_models(mg_models)
            if chunks is None:
                return original(bridge, mg_models, hf_model_dir, *rest, **kwargs)
            return load_into_chunks(original, bridge, chunks, hf_model_dir, *rest, **kwargs)

        return load_weights

    @staticmethod
    def _export(original: Callable[..., Any]) -> Callable[..., Any]:
        def export_weights(bridge: Any, mg_models: Any, *rest: Any, **kwargs: Any) -> Iterator[Any]:
            from ...compat.mcore_bridge import cut_models, export_of_chunks

            chunks = cut_models(mg_models)
            if chunks is None:
                return original(bridge, mg_models, *rest, **kwargs)  # type: ignore[no-any-return]
            return export_of_chunks(original, bridge, chunks, *rest, **kwargs)

        return export_weights
