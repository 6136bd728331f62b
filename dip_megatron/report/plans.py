"""The plans that a run ran, as a plan file that it can be repeated from."""

from __future__ import annotations

import logging
from pathlib import Path

from ..core import Plan
from ..core.files import format_plan
from .iterations import IterationReport

logger = logging.getLogger(__name__)

NAME = "plans.jsonl"


class PlanWriter:
    """Appends each training iteration's plan to ``plans.jsonl``; for the first rank of a pipeline. A full disk costs no
    training."""

    def __init__(self, folder: Path):
        self._path = folder / NAME
        self._broken = False

    def record(self, report: IterationReport, plan: Plan, spans: object) -> None:
        """Call after each iteration."""
        if self._broken:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(format_plan(plan) + "\n")
        except OSError as error:
            self._broken = True
            logger.warning("can't write plans to %s (%s); training goes on without them", self._path, error)
