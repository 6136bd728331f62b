"""The model of a loop that no adapter knows, built in the chunks that DIP's schedule runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ..config import DipConfig
from ..describe.files import ConfigurationError
from ..environment import load_settings
from .adapters.generic import GenericLoop
from .hooks import Hooks

_OF_LOOP = (
    "seed", "log_interval", "read_ahead", "another_follows", "sequence_parallel", "distributed_optimizer",
    "weights_by_tokens", "samples",
)  # fmt: skip


def build(
    provider: Callable[..., torch.nn.Module], *, micro_batch_size: int, num_microbatches: int, **settings: Any
) -> list[torch.nn.Module]:
    """See :func:`dip_megatron.build_model`."""
    if not (dist.is_initialized() and parallel_state.model_parallel_is_initialized()):
        raise RuntimeError("initialize torch.distributed and Megatron's parallel_state before dip_megatron.build_model")
    of_loop = {name: settings.pop(name) for name in _OF_LOOP if name in settings}
    unknown = set(settings) - set(DipConfig.model_fields) - {"config"}
    if unknown:
        raise ConfigurationError(f"build_model: no setting {sorted(unknown)[0]!r}; docs/any-loop.md lists them")
    config = load_settings(settings).config
    runs = Hooks.installed().runs
    loop = GenericLoop(micro_batch_size=micro_batch_size, num_microbatches=num_microbatches, **of_loop)
    alone = parallel_state.get_pipeline_model_parallel_world_size() < 2 and config.balance == "off"
    if not config.on or alone:
        first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        own = runs.pair(loop, config).noting(provider) if config.pairs else provider
        return [own(pre_process=first, post_process=last)]
    return runs.begin(loop, config).segmented(provider)(pre_process=True, post_process=True)
