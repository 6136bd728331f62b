"""``megatron.training``, in Megatron-LM's place or moved to another by a fork.

A package counts as one if its modules have the names and functions that are wrapped here; they may load at any time.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...describe.files import ConfigurationError
from ..arguments import add_arguments, check_arguments, parallel_of, run_config
from ..switched_off import switch_off
from .layout import GivenLayout, given_layout, take_layout
from .loader_state import LoaderState
from .loop import LoopSettings, Target, TrainingLoop

if TYPE_CHECKING:
    from ...describe.model import Partition
    from ..checkpoints import Checkpoint
    from ..runs import Runs

_LOADER_STATE, _STATE = "maybe_save_dataloader_state", "generate_state_dict"
_BUILDERS = "models that Megatron's builders build, as for pretrain_gpt.py"


class MegatronLoop(TrainingLoop):
    """A run of ``megatron.training`` (``package`` is what it is called here), by its validated arguments."""

    def __init__(self, args: Any, package: str = "megatron.training", layout: GivenLayout | None = None):
        batches = ("rampup_batch_size", "step_batch_size_schedule")
        growing = any(getattr(args, name, None) for name in batches)
        settings = LoopSettings(
            parallel_of(args),
            args.micro_batch_size, max(args.global_batch_size // (args.micro_batch_size * args.data_parallel_size), 1),
            args.seed, args.log_interval,
            # An iteration of fewer microbatches would leave some that no state tells of.
            read_ahead=not (growing and getattr(args, "dataloader_save", None)),
            layout=layout, weights_by_tokens=bool(getattr(args, "calculate_per_token_loss", False)), finalizes=True,
        )  # fmt: skip
        super().__init__(settings)
        self._args = args
        self._package = package
        self.loader_state = LoaderState()

    def iteration(self) -> int:
        """As Megatron's log counts; evaluations have that of the iteration before."""
        return int(getattr(self._args, "curr_iteration", self._args.iteration - 1)) + 1

    def another_follows(self) -> bool:
        """Iterations to skip are read by Megatron itself."""
        following = int(self._args.curr_iteration) + 1
        skipped = self._args.iterations_to_skip or []  # counted from 0 in releases before 0.17
        return following < self._args.train_iters and not {following, following + 1} & set(skipped)

    def about_to_read_ahead(self, data_iterator: Any) -> None:
        """Keep the loader's state for a checkpoint of this iteration."""
        self.loader_state.keep(data_iterator if getattr(self._args, "dataloader_save", None) else None)

    def checkpoint(self) -> Checkpoint | None:
        from ..checkpoints import find_checkpoint

        return find_checkpoint(self._args, importlib.import_module(f"{self._package}.checkpointing"))

    def record(self, chunks: Partition) -> str | None:
        from ..checkpoints import record, warn_of_bound_state

        record(self._args, chunks)
        return warn_of_bound_state(self._args)

    def write_scalars(self, scalars: dict[str, float], iteration: int) -> None:
        """To Megatron's TensorBoard and Weights & Biases writers, which exist on the last rank of the job."""
        writers = importlib.import_module(f"{self._package}.global_vars")
        board, weights_and_biases = writers.get_tensorboard_writer(), writers.get_wandb_writer()
        if board is not None:
            for name, value in scalars.items():
                board.add_scalar(name, value, iteration)
        if weights_and_biases is not None:
            weights_and_biases.log(scalars, iteration)


class MegatronTraining:
    """See :class:`.loop.LoopAdapter`."""

    def __init__(self, runs: Runs):
        self._runs = runs
        self._loop: MegatronLoop | None = None
        self._targets = {
            "arguments": (
                Target("add_megatron_arguments", self._arguments, "the --dip- flags"),
                Target("validate_args", self._validated, "checking flags, starting DIP"),
            ),
            # initialize.py imported it by name in releases before 0.17.
            "initialize": (Target("validate_args", self._validated),),
            "training": (
                Target("get_model", self._get_model, "models of a script's provider"),
                Target("save_grads", self._dump),  # from 0.19 on
            ),
            "checkpointing": (
                Target(_STATE, self._state_dict, "the optimizer's step in checkpoints"),
                Target(_LOADER_STATE, self._loader_state),
            ),
            # From 0.19 on scripts may give a model's config instead of a provider.
            "dist_utils": (
                Target("build_virtual_pipeline_stages", self._stages, _BUILDERS),
                Target("prepare_existing_model_chunks_for_distributed_training", self._prepared, _BUILDERS),
            ),
        }  # fmt: skip

    def wanted(self, module: str) -> bool:
        """By its last name alone: a fork may have moved it anywhere."""
        return module.rpartition(".")[2] in self._targets

    def targets(self, module: ModuleType) -> Sequence[Target]:
        """All, if the module is Megatron-LM's, or looks as if it were a copy."""
        name = module.__name__.rpartition(".")[2]
        upstream = module.__name__ == f"megatron.training.{'models.' if name == 'dist_utils' else ''}{name}"
        if not (upstream or all(hasattr(module, sign) for sign in _SIGNS[name])):
            return ()
        # Megatron-Bridge's, a copy in these respects, has an adapter that knows its loop.
        own = module.__name__.startswith("megatron.bridge.")
        return [t for t in self._targets[name] if not (own and t.attribute in (_LOADER_STATE, _STATE))]

    def _arguments(self, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda parser: add_arguments(original(parser))

    def _validated(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def validate(args: Any, *rest: Any, **kwargs: Any) -> Any:
            try:
                config = run_config(args)
                for line in switch_off(args) if config.on else ():
                    self._runs.tell(line)
                check_arguments(args)
                result = original(args, *rest, **kwargs)
                check_arguments(args)  # validation derives sizes that the check looks at
            except ConfigurationError as error:
                sys.exit(f"dip: {error}")
            if config.on:
                from ..shared_gpu import single_ranks_on_nccl

                single_ranks_on_nccl(args)
                package = original.__module__.rpartition(".")[0]
                layout = given_layout(args)
                take_layout(args)
                self._loop = MegatronLoop(args, package, layout)
                try:
                    self._runs.begin(self._loop, config)
                except ConfigurationError as error:
                    sys.exit(f"dip: {error}")
            elif config.pairs:
                self._runs.pair(MegatronLoop(args, original.__module__.rpartition(".")[0], None), config)
            return result

        return validate

    def _built_by(self, provider: Callable[..., Any]) -> Callable[..., Any] | None:
        """What builds a model instead of a script's ``provider``; None: that itself."""
        if self._runs.session is not None:
            return self._runs.session.segmented(provider)
        return None if self._runs.pairing is None else self._runs.pairing.noting(provider)

    def _get_model(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_model(provider: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
            builder = self._built_by(provider)
            if builder is None:
                return original(provider, *rest, **kwargs)
            try:
                return original(builder, *rest, **kwargs)
            except ConfigurationError as error:
                sys.exit(f"dip: {error}")

        return get_model

    def _stages(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def build_virtual_pipeline_stages(build: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
            builder = self._built_by(build)
            if builder is None:
                return original(build, *rest, **kwargs)
            try:
                stages = original(builder, *rest, **kwargs)
                # One stage as Megatron asks for it, which is all chunks of this rank.
                return stages[0] if isinstance(stages[0], list) else stages
            except ConfigurationError as error:
                sys.exit(f"dip: {error}")

        return build_virtual_pipeline_stages

    def _prepared(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(chunks: list[Any], config: Any, *rest: Any, **kwargs: Any) -> Any:
            # Wrappers for mixed precision must know how many chunks there are: the whole model's config doesn't.
            own = config if self._runs.session is None else chunks[0].config
            return original(chunks, own, *rest, **kwargs)

        return prepare

    def _loader_state(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def maybe_save_dataloader_state(train_iterator: Any, *rest: Any, **kwargs: Any) -> Any:
            if self._loop is not None:
                train_iterator = self._loop.loader_state.of(train_iterator)
            return original(train_iterator, *rest, **kwargs)

        return maybe_save_dataloader_state

    def _dump(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def save_grads(save_dir: Any, state_dict: Any, *rest: Any, **kwargs: Any) -> Any:
            from ..dumps import by_whole_names

            if self._runs.session is not None and self._runs.session.chunks:
                state_dict = by_whole_names(state_dict, self._runs.session.chunks)
            return original(save_dir, state_dict, *rest, **kwargs)

        return save_grads

    def _state_dict(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def generate_state_dict(*args: Any, **kwargs: Any) -> Any:
            from ..checkpoints import share_step

            state = original(*args, **kwargs)
            loading = (kwargs.get("optim_sd_kwargs") or {}).get("is_loading", False)
            by_place = getattr(args[0] if args else kwargs.get("args"), "ckpt_format", None) == "torch"
            if self._runs.session is not None and not loading and not by_place:
                share_step(state)
            return state

        return generate_state_dict


_SIGNS = {
    "arguments": ("add_megatron_arguments", "validate_args"),
    "initialize": ("initialize_megatron", "validate_args"),
    "training": ("get_model", "train_step", "setup_model_and_optimizer"),
    "checkpointing": ("generate_state_dict", "_load_base_checkpoint"),
    "dist_utils": ("build_virtual_pipeline_stages", "prepare_existing_model_chunks_for_distributed_training"),
}
