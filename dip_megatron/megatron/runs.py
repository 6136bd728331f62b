"""The runs of this process, and which of them a call of Megatron's schedule belongs to.

Light to import, as the hooks are: sessions load when a run begins.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import DipConfig
    from ..families.family import ModelFamily
    from ..runtime.protocol import SamplePacking
    from .adapters.loop import TrainingLoop
    from .pairing import Pairing
    from .session import DipSession

logger = logging.getLogger(__name__)


class Runs:
    """The runs that loops of this process have begun, and what was set for them before they began."""

    def __init__(self, before_run: Callable[[], object]):
        """``before_run()`` is called as each run begins: the hooks look whether they are all in place."""
        self._before_run = before_run
        self._sessions: list[DipSession] = []
        self._families: list[ModelFamily] = []
        self._samples: SamplePacking | None = None
        self._told: set[str] = set()
        # Makes a run under DIP; an estimate puts its own here.
        self.make_session: Callable[..., Any] | None = None
        # The run under Megatron's own schedule whose microbatches are given longest first.
        self.pairing: Pairing | None = None
        # Whether a run has been asked for, though no loop has begun one yet.
        self.expected = False

    def add_families(self, families: Sequence[ModelFamily]) -> None:
        """Look for models of these families, too. Raises ValueError if a class has another family already."""
        for family in families:
            known = next((f for f in self.families() if f.model_class is family.model_class), None)
            if known is None:
                self._families.append(family)
            elif known is not family:
                raise ValueError(f"{family.model_class.__name__} already belongs to the model family {known.name!r}")

    def families(self) -> list[ModelFamily]:
        """All that are known."""
        if not self._families:
            from ..families.known import known_families

            self._families = list(known_families())
        return self._families

    def pack_samples(self, samples: SamplePacking) -> None:
        """Let loops that begin from now on say that they pack samples into microbatches like this."""
        self._samples = samples

    def begin(self, loop: TrainingLoop, config: DipConfig) -> DipSession:
        """A run under DIP, of which an adapter knows the loop. ``config.schedule`` is not ``off``."""
        from .session import DipSession

        self._before_run()
        if self._samples is not None and loop.settings.samples is None:
            loop.settings = replace(loop.settings, samples=self._samples)
        self._sessions.append((self.make_session or DipSession)(loop, config, self.families(), self.tell))
        return self._sessions[-1]

    def pair(self, loop: TrainingLoop, config: DipConfig) -> Pairing:
        """A run under Megatron's own schedule, whose microbatches are to be given longest first."""
        from .pairing import Pairing

        self._before_run()
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

    def choose(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """What a loop gets instead of Megatron's ``schedule``: the same where there is no run under DIP. Loops may ask
        before they build their model, and keep the answer; so whose model it is, is found at each call."""
        if not self._sessions and not self.expected and self.pairing is None:
            return schedule

        @functools.wraps(schedule)
        def forward_backward(*args: Any, **kwargs: Any) -> Any:
            from .call import ScheduleCall

            model = kwargs.get("model")
            owner = next((session for session in self._sessions if session.owns(model)), None)
            for session in self._sessions:
                if session is not owner:
                    session.check_other_call(kwargs.get("data_iterator"))
            if owner is not None:
                return owner.run(ScheduleCall.parse(kwargs))
            if self.pairing is not None:
                if self.pairing.owns(model):
                    kwargs["data_iterator"] = self.pairing.ordered(ScheduleCall.parse(kwargs))
                return schedule(*args, **kwargs)
            self.tell(
                "a model that DIP didn't build runs under Megatron's own schedule; to have DIP schedule it, build it "
                "with dip_megatron.build_model (docs/any-loop.md)"
            )
            return schedule(*args, **kwargs)

        return forward_backward
