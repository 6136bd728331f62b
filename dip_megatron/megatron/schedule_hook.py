"""Megatron-Core's ``get_forward_backward_func``, wherever it is held: the one place where every loop gets its schedule.

Loops import the name long before anybody installs a hook, and keep what it returns for all of training. So every loaded
module that holds the function gets ours, modules that load later import ours from Megatron-Core, and which schedule
runs is decided at each call, by the model that it is given.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .marks import MARK, owner_of

logger = logging.getLogger(__name__)

NAME = "get_forward_backward_func"
HOME = "megatron.core.pipeline_parallel.schedules"

Choose = Callable[..., Callable[..., Any]]
"""From Megatron's schedule to the function to hand out in its place."""


def hook_schedule(home: ModuleType, choose: Choose, owner: object) -> Callable[..., Any] | None:
    """Replace the function in Megatron-Core's ``schedules`` module (``home``) and in every loaded module that holds it,
    under whatever name; returns ours, or None if Megatron-Core has no such function.

    ``choose(schedule)`` is asked at every call of the function and returns what its caller gets.
    """
    original = getattr(home, NAME, None)
    if original is None:
        return None
    if hasattr(original, MARK):
        return original  # type: ignore[no-any-return]
    if original.__module__ != home.__name__:
        logger.warning(
            "dip: %s.%s was replaced by %s before DIP was installed; what DIP doesn't schedule runs by that",
            HOME, NAME, owner_of(original),
        )  # fmt: skip

    @functools.wraps(original)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        return choose(original(*args, **kwargs))

    setattr(get_forward_backward_func, MARK, owner)
    for module, name in holders(original):
        setattr(module, name, get_forward_backward_func)
    return get_forward_backward_func


def holders(value: object) -> list[tuple[ModuleType, str]]:
    """Loaded modules that hold ``value`` as a global, and its names there."""
    found = []
    for module in list(sys.modules.values()):
        try:
            names = object.__getattribute__(module, "__dict__")  # as it is: modules may load things when asked
        except AttributeError:
            continue
        found += [(module, name) for name, held in list(names.items()) if held is value]
    return found
