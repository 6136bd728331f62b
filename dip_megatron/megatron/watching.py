"""Being told of modules as they load: those that are there already, and each later one once it has run."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class ModuleWatch(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it lets the other finders find a module, and calls ``loaded`` when that has been executed.

    Only modules whose name ``wanted`` accepts are followed; all others cost that one call.
    """

    def __init__(self, wanted: Callable[[str], bool], loaded: Callable[[ModuleType], None]):
        self._wanted = wanted
        self._loaded = loaded
        self._finding: set[str] = set()

    def install(self) -> None:
        """Watch from now on."""
        sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See importlib.abc.MetaPathFinder."""
        if name in self._finding or not self._wanted(name):
            return None
        self._finding.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._finding.discard(name)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        execute, told = loader.exec_module, self._loaded

        def exec_module(module: ModuleType) -> None:
            loader.exec_module = execute
            execute(module)
            told(module)

        loader.exec_module = exec_module
