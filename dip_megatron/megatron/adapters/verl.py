"""verl's Megatron engine, whose models are Megatron-Bridge's.

Its settings are its own, so that the environment (or the YAML file) asks for DIP. The model that trains runs under DIP;
others of the same process (a reference, say) run as without. Microbatches are seen when the engine calls the schedule
with them, and are planned then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...describe.files import ConfigurationError
from ...environment import load_settings
from .loop import Target
from .megatron_bridge import take_layout

if TYPE_CHECKING:
    from ..runs import Runs
    from .generic import GenericLoop

_MODULE = "verl.utils.megatron_utils"
_USUAL = 16
"""Microbatches of an iteration, for the first choice of a partition; how many come shows at each call."""


def refusals(wrap_config: Any, provider: Any, peft_cls: Any) -> list[tuple[str, str, str]]:
    """What DIP can't run of an engine's model: setting, reason and way out of each. ``provider`` is Megatron-Bridge's,
    None if the model isn't."""
    found = [
        (provider is None, "vanilla_mbridge", "DIP knows no models of mbridge", "set it to False"),
        (wrap_config.is_value_model, "a value model", "its head replaces the language model's after it is built",
         "train the actor under DIP alone"),
        (wrap_config.use_megatron_fsdp, "use_megatron_fsdp", "it gathers parameters in one fixed order of layers",
         "use the distributed optimizer"),
        (wrap_config.use_layer_wise_distributed_optimizer, "the layer-wise optimizer", "untried", "use adam"),
        (peft_cls is not None, "adapters", "untried in verl", "train all parameters"),
    ]  # fmt: skip
    if provider is not None:
        pipeline, context = provider.pipeline_model_parallel_size, provider.context_parallel_size
        found += [
            (pipeline < 2, f"pipeline_model_parallel_size {pipeline}", "there is no pipeline to schedule",
             "use 2 or more"),
            (context > 1, f"context_parallel_size {context}", "models of Megatron-Bridge run without it",
             "use tensor parallelism"),
        ]  # fmt: skip
    return [(setting, reason, way_out) for unfit, setting, reason, way_out in found if unfit]


class Verl:
    """See :class:`.loop.LoopAdapter`."""

    def __init__(self, runs: Runs):
        self._runs = runs

    def wanted(self, module: str) -> bool:
        return module == _MODULE

    def targets(self, module: ModuleType) -> Sequence[Target]:
        return (Target("make_megatron_module", self._make, "models of verl's Megatron engine"),)

    def _make(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def make_megatron_module(
            wrap_config: Any, *rest: Any, provider: Any = None, peft_cls: Any = None, **kwargs: Any
        ) -> Any:
            given = {**kwargs, "provider": provider, "peft_cls": peft_cls}
            try:
                config = load_settings({}).config
                if not (config.on and wrap_config.wrap_with_ddp):  # a model that doesn't train has no gradients
                    return original(wrap_config, *rest, **given)
                for setting, reason, way_out in refusals(wrap_config, provider, peft_cls):
                    raise ConfigurationError(
                        f"schedule {config.schedule} and {setting}: {reason}; {way_out}, or use schedule off"
                    )
                session = self._runs.begin(self._loop(wrap_config, provider), config)
                # Of the provider, Bridge asks for no more where it creates a model, and takes a list of chunks, too.
                provider.provide = session.segmented(provider.provide)
                try:
                    chunks, _ = original(wrap_config, *rest, **given)
                finally:
                    del provider.provide
                # verl counts layers by the whole model's config, which a chunk's isn't.
                return chunks, provider
            except ConfigurationError as error:
                sys.exit(f"dip: {error}")

        return make_megatron_module

    def _loop(self, wrap_config: Any, provider: Any) -> GenericLoop:
        from megatron.core import parallel_state

        from ...families.multimodal.bridge_models import BRIDGE_FAMILIES
        from .generic import GenericLoop

        self._runs.add_families(BRIDGE_FAMILIES)
        layout = take_layout(provider)
        parallel_state.set_virtual_pipeline_model_parallel_world_size(None)  # verl has told it of virtual stages
        return GenericLoop(
            sequence_parallel=provider.sequence_parallel, distributed_optimizer=wrap_config.use_distributed_optimizer,
            micro_batch_size=1, num_microbatches=_USUAL, layout=layout, finalizes=True,
        )  # fmt: skip
