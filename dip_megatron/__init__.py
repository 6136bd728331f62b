"""DIP for Megatron-LM: pipeline schedules planned for every batch of a large multimodal model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .families.family import ModelFamily

__version__ = "0.1.0"


def install(families: Sequence[ModelFamily] = ()) -> None:
    """Hook DIP into ``megatron.training``: adds the argument group ``dip`` and acts only where ``--dip-schedule`` asks.

    Call it before Megatron parses its arguments. ``families`` are models of yours that DIP shall segment
    (docs/add-a-model.md); calling it again only adds families. Raises ImportError if ``megatron.training`` can't be
    imported, ValueError if a model class has a family already.
    """
    from .megatron.hooks import Hooks, warn_of_version

    hooks = Hooks.installed()
    if hooks is not None:
        hooks.add_families(families)
        return
    hooks = Hooks()
    hooks.add_families(families)
    warn_of_version(hooks.install())
