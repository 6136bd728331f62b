"""DIP's hooks: in Megatron-Core's schedules, and in the modules of every loop that an adapter knows.

Light to import, because it may have to be while Megatron-Core is being imported: sessions load when a run begins.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..compat.names import being_imported
from ..compat.releases import TESTED, megatron_version, version_numbers
from ..describe.files import ConfigurationError
from ..environment import asks
from .adapters.loop import LoopAdapter, Target, TrainingLoop
from .adapters.megatron_bridge import MegatronBridge
from .adapters.megatron_training import MegatronTraining
from .adapters.ms_swift import MsSwift
from .adapters.roll import Roll
from .adapters.verl import Verl
from .marks import MARK, ours_inside, owner_of
from .schedule_hook import HOME, NAME, hook_schedule
from .watching import ModuleWatch

if TYPE_CHECKING:
    from ..config import DipConfig
    from ..families.family import ModelFamily
    from ..runtime.protocol import SamplePacking
    from .pairing import Pairing
    from .session import DipSession

logger = logging.getLogger(__name__)

_installed: Hooks | None = None


class Hooks:
    """All hooks of the process; without a run under DIP each calls straight through."""

    def __init__(self) -> None:
        self._sessions: list[DipSession] = []
        self._families: list[ModelFamily] = []
        self._adapters: list[LoopAdapter] = [
            MegatronTraining(self), MegatronBridge(self), MsSwift(self), Verl(self), Roll(self),
        ]  # fmt: skip
        # Modules, and classes in them.
        self._placed: list[tuple[Any, str, Callable[..., Any]]] = []
        self._missing: list[str] = []
        self._unfinished: list[ModuleType] = []
        self._told: set[str] = set()
        self._installing = False
        self._samples: SamplePacking | None = None
        # What a run under DIP is; an estimate puts its own here.
        self.make_session: Callable[..., Any] | None = None
        # Of a run under Megatron's own schedule.
        self.pairing: Pairing | None = None
        # Whether a run has been asked for, though no loop has begun one yet.
        self._expected = False

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

    def add_families(self, families: Sequence[ModelFamily]) -> None:
        """Look for models of these families, too. Raises ValueError if a class has another family already."""
        for family in families:
            known = next((f for f in self.families() if f.model_class is family.model_class), None)
            if known is None:
                self._families.append(family)
            elif known is not family:
                raise ValueError(f"{family.model_class.__name__} already belongs to the model family {known.name!r}")

    def pack_samples(self, samples: SamplePacking) -> None:
        """Let loops that begin from now on say that they pack samples into microbatches like this."""
        self._samples = samples

    def families(self) -> list[ModelFamily]:
        """All that are known."""
        if not self._families:
            from ..families.known import known_families

            self._families = list(known_families())
        return self._families

    def begin(self, loop: TrainingLoop, config: DipConfig) -> DipSession:
        """A run under DIP, of which an adapter knows the loop. ``config.schedule`` is not ``off``."""
        from .session import DipSession

        self._finish()
        if loop.samples is None:
            loop.samples = self._samples
        for place, name, wrapped in self._placed:
            found = getattr(place, name, None)
            if found is not wrapped and not ours_inside(found):
                self.tell(
                    f"{place.__name__}.{name}, a hook of DIP's, has been replaced by {owner_of(found)}; if that "
                    "doesn't call DIP's, install DIP after it"
                )
        self._sessions.append((self.make_session or DipSession)(loop, config, self.families(), self.tell))
        return self._sessions[-1]

    def pair(self, loop: TrainingLoop, config: DipConfig) -> Pairing:
        """A run under Megatron's own schedule, whose microbatches are to be given longest first."""
        from .pairing import Pairing

        self._finish()
        self.pairing = Pairing(loop, config, self.families())
        return self.pairing

    @property
    def session(self) -> DipSession | None:
        """The run that began last, if any."""
        return self._sessions[-1] if self._sessions else None

    def end(self, session: DipSession) -> None:
        """A run is over, and its ranks are about to lose each other."""
        self._sessions.remove(session)
        session.close()

    def tell(self, sentence: str) -> None:
        """Say it once, on the first rank."""
        if sentence not in self._told and os.environ.get("RANK", "0") == "0":
            self._told.add(sentence)
            logger.warning("dip: %s", sentence)

    # -- places --------------------------------------------------------------------------------------------------
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
            self._expected = asks()
        except ConfigurationError as error:
            sys.exit(f"dip: {error}")
        schedule = hook_schedule(home, self._choose, self)
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
        self.tell(f"Megatron-Core {megatron_version()} {found}. DIP is tested with {tested} (README.md, Versions)")

    # -- calls ---------------------------------------------------------------------------------------------------
    def _choose(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """What a loop gets instead of Megatron's ``schedule``: the same where there is no run under DIP. Loops may ask
        before they build their model, and keep the answer; so whose model it is, is found at each call."""
        if not self._sessions and not self._expected and self.pairing is None:
            return schedule

        @functools.wraps(schedule)
        def forward_backward(*args: Any, **kwargs: Any) -> Any:
            owner = next((session for session in self._sessions if session.owns(kwargs.get("model"))), None)
            for session in self._sessions:
                if session is not owner:
                    session.check_other_call(kwargs.get("data_iterator"))
            if owner is not None:
                return owner.run(**kwargs)
            if self.pairing is not None:
                owned = self.pairing.owns(kwargs.get("model"))
                return schedule(*args, **(self.pairing.ordered(kwargs) if owned else kwargs))
            self.tell(
                "a model that DIP didn't build runs under Megatron's own schedule; to have DIP schedule it, build it "
                "with dip_megatron.build_model (docs/any-loop.md)"
            )
            return schedule(*args, **kwargs)

        return forward_backward
