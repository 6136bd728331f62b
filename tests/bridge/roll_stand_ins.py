"""Packages that ROLL imports and a training step doesn't use, where they aren't installed: of its transfer queue, its
images and its tracing. And DIP is hooked in as the wheel's start-up file does it, before ROLL loads."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

from dip_megatron.startup import watch

NAMES = ("transfer_queue", "pybase64", "opentelemetry")


class Empty(ModuleType):
    """A package with a class for whatever is asked of it."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in NAMES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.append(_Finder())  # what is installed comes first
watch()
