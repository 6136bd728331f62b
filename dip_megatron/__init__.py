"""DIP for Megatron-LM: pipeline schedules planned for every batch of a large multimodal model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module

    from .families.family import ModelFamily

__version__ = "0.1.0"


def install(families: Sequence[ModelFamily] = ()) -> None:
    """Hook DIP into Megatron-Core's schedules and into the training loops it knows; it acts only where it is asked to.

    Call it before the loop parses its arguments or builds its model; modules may be imported before or after. With
    ``megatron.training`` it adds the argument group ``dip``, other loops ask through the environment or
    :func:`build_model`. ``families`` are models of yours that DIP shall segment (docs/add-a-model.md); calling it again
    only adds families. Raises ImportError if Megatron-Core can't be imported, ValueError if a model class has a family
    already.
    """
    from .megatron.hooks import Hooks

    Hooks.installed().add_families(families)


def build_model(
    provider: Callable[..., Module], *, micro_batch_size: int, num_microbatches: int, **settings: Any
) -> list[Module]:
    """Build this pipeline rank's chunks of a model for a loop that DIP doesn't know (docs/any-loop.md).

    ``provider(pre_process=..., post_process=...)`` builds the model as Megatron's providers do. Wrap each chunk as a
    stage of an interleaved pipeline, and give all of them to Megatron-Core's schedule; what
    ``get_forward_backward_func()`` returns runs them under DIP's plans. ``num_microbatches`` of an iteration and data
    parallel rank is a guess by which the model is cut; iterations may have any number.

    ``settings`` are those of the YAML file by their names (``schedule="dynamic"``, ``search_budget=0.1``, ...), over
    the environment and over the file at ``config``; and of the loop: ``seed``, ``log_interval`` (iterations a line of
    the log), ``read_ahead`` (whether the data iterator may be read while an iteration trains), ``another_follows()``
    (whether the iteration about to run is followed by another; asked only with ``read_ahead``), ``sequence_parallel``
    and ``distributed_optimizer``. With ``schedule`` off, or one pipeline rank, it returns the provider's stage.

    Raises ConfigurationError, in one line, for settings or a model that DIP can't take, RuntimeError before Megatron's
    parallel state is initialized.
    """
    from .megatron.adapters.generic import build

    return build(provider, micro_batch_size=micro_batch_size, num_microbatches=num_microbatches, **settings)
