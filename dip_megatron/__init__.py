"""DIP for Megatron-LM: pipeline schedules planned for every batch of a large multimodal model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models.family import ModelFamily

__version__ = "0.1.0"


def install(families: Sequence[ModelFamily] = ()) -> None:
    """Hook DIP into ``megatron.training``: adds the argument group ``dip`` and acts only where ``--dip-schedule`` asks.

    Call it before Megatron parses its arguments. ``families`` are models of yours that DIP shall segment
    (docs/add-a-model.md); calling it again only adds families. Raises ImportError if ``megatron.training`` can't be
    imported, ValueError if a model class has a family already.
    """
    import logging

    from .megatron.hooks import Hooks

    hooks = Hooks.installed()
    if hooks is not None:
        hooks.add_families(families)
        return
    hooks = Hooks()
    hooks.add_families(families)
    missing = hooks.install()
    if missing:
        logging.getLogger(__name__).warning(
            "this Megatron has no %s: --dip-schedule will not work fully. Supported: Megatron-LM 0.16 to 0.19; "
            "see README.md",
            ", ".join(missing),
        )
