"""What a part of the reproduction gives: a table, comparisons with the paper, bars, and every number as data.

A number is *quoted* (printed in the paper), *simulated* (our cost model and simulator; no GPU ran) or *measured*
(seconds of this machine's CPU). Heads of columns say which; in the data the numbers stand under one of the three words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dip_megatron.report.schedules import text_table

CLOSE = 0.10
"""A share by which a number may differ from the paper's without an explanation."""


@dataclass(frozen=True)
class Comparison:
    """One number of the paper beside ours. ``reason``: why they differ, if they do by more than CLOSE."""

    name: str
    paper: float
    ours: float
    reason: str
    unit: str = ""

    @property
    def differs(self) -> bool:
        return abs(self.ours / self.paper - 1) > CLOSE

    def lines(self) -> list[str]:
        """The two numbers on one line, and the reason if one is needed."""
        text = f"{self.name}: paper {self.paper:.4g}{self.unit} (quoted), ours {self.ours:.3g}{self.unit} (simulated)"
        if not self.differs:
            return [f"{text}; within {CLOSE:.0%}"]
        return [f"{text}; {self.ours / self.paper - 1:+.0%}", f"    Why: {self.reason}"]

    def data(self) -> dict[str, Any]:
        out = {"name": self.name, "quoted": self.paper, "simulated": self.ours, "unit": self.unit}
        return out | ({"reason": self.reason} if self.differs else {})


@dataclass(frozen=True)
class Bar:
    """What was promised, and whether it holds: ``value`` must be at least, or at most, ``target``. ``why``: what was
    found out about a bar that is missed."""

    name: str
    value: float
    target: float
    at_most: bool = False
    why: str = ""

    @property
    def met(self) -> bool:
        return self.value <= self.target if self.at_most else self.value >= self.target

    def row(self) -> list[str]:
        sign = "<=" if self.at_most else ">="
        return [self.name, f"{self.value:.3f}", f"{sign} {self.target:g}", "met" if self.met else "MISSED"]

    def data(self) -> dict[str, Any]:
        out = {"name": self.name, "value": self.value, "target": self.target, "at_most": self.at_most, "met": self.met}
        return out | ({} if self.met else {"why": self.why})


@dataclass(frozen=True)
class Table:
    """Rows of text under heads that say what is quoted, simulated or measured."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Result:
    """One part's outcome; ``data`` holds every number under ``quoted``, ``simulated`` or ``measured``."""

    title: str
    setting: str
    tables: Sequence[Table]
    data: Mapping[str, Any]
    comparisons: Sequence[Comparison] = ()
    bars: Sequence[Bar] = ()
    notes: Sequence[str] = ()
    figure: Path | None = field(default=None)

    def text(self) -> str:
        """All of it as printed."""
        out = [f"\n=== {self.title}", self.setting]
        for table in self.tables:
            out += ["", table.title, text_table(table.head, table.rows)]
        if self.comparisons:
            out += ["", "Beside the paper:", *(f"  {line}" for c in self.comparisons for line in c.lines())]
        out += [f"  Note: {note}" for note in self.notes]
        if self.figure is not None:
            out.append(f"  Picture: {self.figure}")
        return "\n".join(out)

    def entry(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "title": self.title,
            "setting": self.setting,
            "numbers": dict(self.data),
            "comparisons": [c.data() for c in self.comparisons],
            "bars": [b.data() for b in self.bars],
            "notes": list(self.notes),
            "figure": self.figure.name if self.figure is not None else None,
        }
