"""DIP's hooks: in Megatron-Core's schedules, and in the modules of every loop that an adapter knows.

Light to import, because it may have to be while Megatron-Core is being imported.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..compat.names import being_imported
from ..compat.releases import TESTED, megatron_version, version_numbers
from ..describe.files import ConfigurationError
from ..environment import asks
from .adapters.loop import LoopAdapter, Target
from .adapters.megatron_bridge import MegatronBridge
from .adapters.megatron_training import MegatronTraining
from .adapters.ms_swift import MsSwift
from .adapters.roll import Roll
from .adapters.verl import Verl
from .marks import MARK, ours_inside, owner_of
from .runs import Runs
from .schedule_hook import HOME, NAME, hook_schedule
from .watching import ModuleWatch

_installed: Hooks | None = None


class Hooks:
    """All hooks of the process; without a run under DIP each calls straight through."""

    def __init__(self) -> None:
        self.runs = runs = Runs(self._before_run)
        self._adapters: list[LoopAdapter] = [
            MegatronTraining(runs), MegatronBridge(runs), MsSwift(runs), Verl(runs), Roll(runs),
        ]  # fmt: skip
        # Modules, and classes in them.
        self._placed: list[tuple[Any, str, Callable[..., Any]]] = []
        self._missing: list[str] = []
        self._unfinished: list[ModuleType] = []
        self._installing = False

    @staticmethod
    def installed(import_core: bool = True) -> Hooks:
        """The hooks of this process, in place: in what is loaded and in what will be. Raises ImportError if
        Megatron-Core can't be imported; with ``import_core`` off it is left to whoever needs it."""
        global _installed
        if _installed is None:
            _installed = Hooks()
            _installed._install()
        if import_core:
            importlib.import_module(HOME)
        return _installed

    def _before_run(self) -> None:
        """All hooks are put where they can be by now, and one that another package has replaced is told of."""
        self._finish()
        for place, name, wrapped in self._placed:
            found = getattr(place, name, None)
            if found is not wrapped and not ours_inside(found):
                self.runs.tell(
                    f"{place.__name__}.{name}, a hook of DIP's, has been replaced by {owner_of(found)}; if that "
                    "doesn't call DIP's, install DIP after it"
                )

    def _install(self) -> None:
        ModuleWatch(self._wanted, self._hook).install()
        self._installing = True
        for module in [m for name, m in list(sys.modules.items()) if isinstance(m, ModuleType) and self._wanted(name)]:
            if being_imported(module):
                self._unfinished.append(module)  # it is being imported, and has called us meanwhile
            else:
                self._hook(module)
        self._installing = False
        if HOME in sys.modules:
            self._warn_of_version()

    def _wanted(self, name: str) -> bool:
        return name == HOME or any(adapter.wanted(name) for adapter in self._adapters)

    def _hook(self, module: ModuleType) -> None:
        """Wrap what DIP needs of a module that has been loaded."""
        if module.__name__ == HOME:
            self._hook_schedule(module)
        missing = []
        wanting = [adapter for adapter in self._adapters if adapter.wanted(module.__name__)]
        for target in (target for adapter in wanting for target in adapter.targets(module)):
            owner, _, name = target.attribute.rpartition(".")
            place = getattr(module, owner, None) if owner else module
            original = getattr(place, name, None)
            if original is None:
                if target.purpose:
                    missing.append(f"{module.__name__}.{target.attribute} ({target.purpose})")
            elif not hasattr(original, MARK):
                self._wrap(place, name, target, original)
        self._missing += missing
        if (missing or module.__name__ == HOME) and not self._installing:
            self._warn_of_version()
        self._finish()

    def _finish(self) -> None:
        """Hook the modules that were being imported when the hooks were installed, and are there now."""
        done = [m for m in self._unfinished if not being_imported(m)]
        self._unfinished = [m for m in self._unfinished if m not in done]
        for module in done:
            self._hook(module)

    def _hook_schedule(self, home: ModuleType) -> None:
        try:
            self.runs.expected = asks()
        except ConfigurationError as error:
            sys.exit(f"dip: {error}")
        schedule = hook_schedule(home, self.runs.choose, self)
        if schedule is None:
            self._missing.append(f"{HOME}.{NAME} (the schedule)")
        else:
            self._placed.append((home, NAME, schedule))

    def _wrap(self, place: Any, name: str, target: Target, original: Callable[..., Any]) -> None:
        wrapped = functools.wraps(original)(target.wrap(original))
        setattr(wrapped, MARK, self)
        setattr(place, name, wrapped)
        self._placed.append((place, name, wrapped))

    def _warn_of_version(self) -> None:
        """Say what could not be hooked, or that this Megatron is not a tested one."""
        untested = not TESTED[0] <= version_numbers() <= TESTED[1]
        if not (self._missing or untested):
            return
        tested = " to ".join(f"{major}.{minor}" for major, minor in TESTED)
        found = "has all it hooks into"
        if self._missing:
            found = f"has no {', no '.join(sorted(self._missing))}: --dip-schedule will not work fully"
        self._missing = []
        self.runs.tell(f"Megatron-Core {megatron_version()} {found}. DIP is tested with {tested} (README.md, Versions)")
