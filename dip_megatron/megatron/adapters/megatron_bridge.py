"""Megatron-Bridge's ``pretrain`` and ``finetune``.

A recipe asks for DIP by its configuration (``config.dip = {"schedule": "dynamic"}``, names as in the YAML file), or the
environment does. Other loops that take their model from Bridge's providers go through ``dip_megatron.build_model``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from ...compat.token_counts import TokenCounts
from ...describe.files import ConfigurationError
from ...environment import load_settings
from ..switched_off import switch_off
from .bridge_checkpoints import find_bridge_checkpoint, state_of, warn_of_bound_state
from .bridge_checks import check_bridge, check_release, parallel_of
from .layout import GivenLayout, given_layout
from .loader_state import LoaderState
from .loop import LoopSettings, Target, TrainingLoop

if TYPE_CHECKING:
    from ...config import DipConfig
    from ...describe.model import Partition
    from ..checkpoints import Checkpoint
    from ..runs import Runs
    from ..session import DipSession

_LAYOUT = {
    "virtual_pipeline_model_parallel_size": "virtual_pipeline_model_parallel_size",
    "pipeline_model_parallel_layout": "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split": "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split": "account_for_loss_in_pipeline_split",
}
"""Bridge's names of what lays out layers, and Megatron-LM's."""


class BridgeLoop(TrainingLoop):
    """A run of Bridge's loop, by its state, which holds the validated configuration."""

    def __init__(self, state: Any, layout: GivenLayout | None):
        config = state.cfg
        replicas = config.data_parallel_size
        settings = LoopSettings(
            parallel_of(config),
            config.train.micro_batch_size,
            max(config.train.global_batch_size // (config.train.micro_batch_size * replicas), 1),
            config.rng.seed, config.logger.log_interval, read_ahead=_may_be_read_ahead(config), layout=layout,
            weights_by_tokens=bool(getattr(config.model, "calculate_per_token_loss", False)), finalizes=True,
            adapts=config.peft is not None,
        )  # fmt: skip
        super().__init__(settings, TokenCounts(state))
        self._state = state
        self.loader_state = LoaderState()
        self.chunks: dict[str, Any] = {}
        """What every checkpoint says of them."""

    def iteration(self) -> int:
        """Bridge counts an iteration once it is done."""
        return int(self._state.train_state.step) + 1

    def another_follows(self) -> bool:
        """Iterations to skip are read by Bridge itself."""
        train, following = self._state.cfg.train, self.iteration()
        skipped = set(getattr(train, "iterations_to_skip", None) or ())  # counted from 0
        return following < train.train_iters and following not in skipped

    def about_to_read_ahead(self, data_iterator: Any) -> None:
        """Keep the loader's state for a checkpoint of this iteration."""
        self.loader_state.keep(data_iterator if self._state.cfg.checkpoint.save else None)

    def checkpoint(self) -> Checkpoint | None:
        return find_bridge_checkpoint(self._state.cfg)

    def record(self, chunks: Partition) -> str | None:
        self.chunks = state_of(chunks)
        return warn_of_bound_state(self._state.cfg)

    def write_scalars(self, scalars: dict[str, float], iteration: int) -> None:
        """To Bridge's TensorBoard and Weights & Biases writers, which exist on the last rank of the job."""
        board, weights_and_biases = self._state.tensorboard_logger, self._state.wandb_logger
        if board is not None:
            for name, value in scalars.items():
                board.add_scalar(name, value, iteration)
        if weights_and_biases is not None:
            weights_and_biases.log(scalars, iteration)


def _may_be_read_ahead(config: Any) -> bool:
    """Not where an iterator holds one iteration only, nor of a loader that may save its place while batches grow: an
    iteration of fewer microbatches would leave some that no state tells of."""
    dataset = config.dataset
    keeps = dataset.dataloader_type == "external" or getattr(dataset, "dataloader_save", None) is not None
    return dataset.dataloader_type != "batch" and not (keeps and getattr(config.train, "rampup_batch_size", None))


def take_layout(model: Any) -> GivenLayout | None:
    """The layout that a provider asks for; none of it is left, as chunks are DIP's. Raises ConfigurationError."""
    given = {name: getattr(model, name, None) for name in _LAYOUT}
    given = {name: value for name, value in given.items() if value not in (None, False)}
    if not given:
        return None
    args = SimpleNamespace(
        num_layers=model.num_layers, pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        num_virtual_stages_per_pipeline_rank=given.get("virtual_pipeline_model_parallel_size"),
        **{_LAYOUT[name]: value for name, value in given.items()},
    )  # fmt: skip
    layout = given_layout(args)
    for name, value in given.items():
        setattr(model, name, False if value is True else None)
    return None if layout is None else GivenLayout(tuple(given), layout.layers)


class MegatronBridge:
    """See :class:`.loop.LoopAdapter`."""

    def __init__(self, runs: Runs):
        self._runs = runs
        self._session: DipSession | None = None
        self._loop: BridgeLoop | None = None
        self._targets = {
            "megatron.bridge.training.pretrain": (
                Target("setup", self._setup, "starting DIP"),
                Target("_finish_train", self._finish, "ending DIP"),
            ),
            "megatron.bridge.training.setup": (
                Target("_update_model_config_funcs", self._functions, "what schedules call of the loop"),
            ),
            "megatron.bridge.models.model_provider": (
                Target("_create_model", self._create, "models of Bridge's providers"),
            ),
            "megatron.bridge.training.checkpointing": (
                Target("generate_state_dict", self._state_dict, "the chunks in checkpoints"),
                Target("maybe_save_dataloader_state", self._loader_state, "the state of data loaders in checkpoints"),
            ),
            "megatron.bridge.training.train": (Target("make_data_iterator_list", self._iterators, "the data"),),
            "megatron.bridge.training.eval": (Target("make_data_iterator_list", self._iterators, "the data"),),
        }

    def wanted(self, module: str) -> bool:
        return module in self._targets

    def targets(self, module: ModuleType) -> Sequence[Target]:
        return self._targets[module.__name__]

    def _setup(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def setup(state: Any, *rest: Any, **kwargs: Any) -> Any:
            self._session = self._loop = self._runs.pairing = None
            try:
                config = load_settings(getattr(state.cfg, "dip", None) or {}).config
                if config.schedule != "off":
                    check_release(self._runs.tell)
                    for line in (*switch_off(state.cfg.model), *switch_off(state.cfg.straggler)):
                        self._runs.tell(line)
                    check_bridge(state.cfg, config.schedule)
                    self._session = self._begin(state, config)
                elif config.pairs:
                    self._begin_pairing(state, config)
                return original(state, *rest, **kwargs)
            except ConfigurationError as error:
                sys.exit(f"dip: {error}")

        return setup

    def _begin(self, state: Any, config: DipConfig) -> DipSession:
        from ...families.multimodal.bridge_models import BRIDGE_FAMILIES

        self._runs.add_families(BRIDGE_FAMILIES)
        self._loop = BridgeLoop(state, take_layout(state.cfg.model))
        return self._runs.begin(self._loop, config)

    def _begin_pairing(self, state: Any, config: DipConfig) -> None:
        from ...families.multimodal.bridge_models import BRIDGE_FAMILIES

        self._runs.add_families(BRIDGE_FAMILIES)
        self._runs.pair(BridgeLoop(state, None), config)

    def _finish(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def finish_train(*args: Any, **kwargs: Any) -> Any:
            # Bridge goes on to end the process groups over which DIP's ranks talk.
            if self._session is not None:
                self._runs.end(self._session)
                self._session = self._loop = None
            return original(*args, **kwargs)

        return finish_train

    def _create(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def create_model(provider: Any, *rest: Any, **kwargs: Any) -> Any:
            if self._session is None and self._runs.pairing is not None:
                noting = self._runs.pairing.noting(provider.provide)
                return original(SimpleNamespace(provide=noting), *rest, **kwargs)
            if self._session is None:
                return original(provider, *rest, **kwargs)
            # Of the provider, Bridge asks for no more here, and takes a list of chunks, too.
            return original(SimpleNamespace(provide=self._session.segmented(provider.provide)), *rest, **kwargs)

        return create_model

    def _functions(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def update_model_config_funcs(model: list[Any], config: Any, *rest: Any, **kwargs: Any) -> Any:
            original(model, config, *rest, **kwargs)
            if self._session is not None and self._session.owns(model):
                # Schedules look at the first chunk's config, which among DIP's chunks isn't the provider itself.
                own = model[0].config
                own.timers = config.timers
                original(model, own, *rest, **kwargs)

        return update_model_config_funcs

    def _state_dict(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def generate_state_dict(*args: Any, **kwargs: Any) -> Any:
            from ..checkpoints import share_step

            state = original(*args, **kwargs)
            if (kwargs.get("optim_sd_kwargs") or {}).get("is_loading", False):
                return state
            if self._runs.session is not None:
                share_step(state)
            if self._loop is not None:
                state.update(self._loop.chunks)
            return state

        return generate_state_dict

    def _loader_state(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def maybe_save_dataloader_state(model: Any, train_iterator: Any, *rest: Any, **kwargs: Any) -> Any:
            if self._loop is not None:
                train_iterator = self._loop.loader_state.of(train_iterator)
            return original(model, train_iterator, *rest, **kwargs)

        return maybe_save_dataloader_state

    def _iterators(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def make_data_iterator_list(model: list[Any], data_iterator: Any) -> Any:
            if self._session is not None and self._session.owns(model):
                # Views for each chunk, made anew in each iteration, would hide the iterator that can be read ahead.
                return [data_iterator] * len(model)
            return original(model, data_iterator)

        return make_data_iterator_list
