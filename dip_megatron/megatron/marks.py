"""How the functions that DIP put into others' modules are known again."""

from __future__ import annotations

from typing import Any

MARK = "dip_megatron_hook"
"""Attribute of every such function: the hooks that it belongs to."""


def owner_of(function: Any) -> str:
    """A function's module and name, for messages."""
    module = getattr(function, "__module__", None) or type(function).__module__
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def ours_inside(function: Any) -> bool:
    """Whether ``function`` is one of DIP's, or says (as functools.wraps has it) that it wraps one."""
    while function is not None:
        if MARK in getattr(function, "__dict__", {}):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
