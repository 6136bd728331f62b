"""Measured costs: a JSON file that replaces parts of the cost model, or all of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, model_validator

from ...core.graph import Floats
from ...core.strategies import known_strategies, strategy_names
from ...core.versions import is_version, renamed
from ..files import ConfigurationError, validate
from .hardware import Cluster, Curve, Operator, check_curve
from .parts import LayerCost, PartCost
from .sizes import Sizes

Part = Literal["stem", "layer", "head", "stage"]
"""What of a module is priced; a ``stage`` is what every chunk with layers takes beside them, once."""
QUANTITIES = ("forward", "backward", "weight", "activation", "deferred_activation")
STRATEGY_QUANTITIES = ("forward", "backward", "activation")
"""What a layer's memory strategy changes; its W needs the same inputs and does the same products under all."""


@dataclass(frozen=True)
class Table:
    """Measured points of one part of one module: values (seconds, or bytes) at rising numbers of tokens, per rank;
    those of a layer under one memory strategy."""

    module: str
    part: Part
    quantity: str
    tokens: tuple[float, ...]
    values: tuple[float, ...]
    strategy: str = "none"

    def at(self, tokens: Floats) -> Floats:
        """Linear between the points, in proportion to tokens beyond them; nothing for no tokens."""
        xs, ys = np.array(self.tokens), np.array(self.values)
        inside = np.interp(tokens, xs, ys)
        above = ys[-1] * tokens / xs[-1]
        return np.where(tokens > xs[-1], above, np.where(tokens > 0, inside, 0.0))


@dataclass(frozen=True)
class Scale:
    """A factor on one quantity of one part (or all: ``*``), applied after everything else."""

    module: str
    part: str
    quantity: str
    factor: float

    def concerns(self, module: str, part: str, quantity: str) -> bool:
        return self.module in ("*", module) and self.part in ("*", part) and self.quantity in ("*", quantity)


@dataclass(frozen=True)
class Costs:
    """What is known beyond the formula: operator efficiencies, measured parts, factors, and fixed numbers.

    ``transfer_seconds`` replaces the seconds of every transfer, ``static_bytes`` the parameters, gradients and
    optimizer state of each rank, ``memory_limit`` what a rank may use. Empty: the formula alone.
    """

    efficiency: tuple[tuple[Operator, Curve], ...] = ()
    tables: tuple[Table, ...] = ()
    scales: tuple[Scale, ...] = ()
    transfer_seconds: float | None = None
    static_bytes: tuple[float, ...] = ()
    memory_limit: float | None = None
    device: str = field(default="", compare=False)

    def calibrate(self, cluster: Cluster) -> Cluster:
        """The cluster with the measured efficiencies."""
        return cluster.with_efficiency(dict(self.efficiency)) if self.efficiency else cluster

    def adjust(self, module: str, part: Part, cost: PartCost, sizes: Sizes) -> PartCost:
        """``cost`` with measured tables in place of the formula, times the factors."""
        if not self.tables and not self.scales:
            return cost
        values = {q: getattr(cost, q) for q in QUANTITIES}
        for table in self.tables:
            if (table.module, table.part, table.strategy) == (module, part, "none"):
                values[table.quantity] = table.at(sizes.tokens)
        for scale in self.scales:
            for q in QUANTITIES:
                if scale.concerns(module, part, q):
                    values[q] = values[q] * scale.factor
        return PartCost(**values)

    def adjust_strategies(self, module: str, cost: LayerCost, sizes: Sizes) -> LayerCost:
        """A layer's ``cost`` with what was measured under its memory strategies in place of what follows from the layer
        that keeps everything, times the factors. What stands instead of a measured one has its numbers, too."""
        measured = [t for t in self.tables if t.part == "layer" and t.module == module and t.strategy != "none"]
        if not measured:
            return cost
        values = {q: getattr(cost, q).copy() for q in STRATEGY_QUANTITIES}
        found = {(t.strategy, t.quantity): t for t in measured}
        for row, entry in enumerate(known_strategies()):
            for quantity, line in values.items():
                table = found.get((entry.name, quantity)) or found.get((entry.instead_of, quantity))
                if table is not None:
                    factors = [s.factor for s in self.scales if s.concerns(module, "layer", quantity)]
                    line[row] = table.at(sizes.tokens) * np.prod(factors)
        return replace(cost, **values)

    def scaled(self, factor: float, module: str = "*", part: str = "*", quantity: str = "*") -> Costs:
        """These costs with one more factor."""
        return Costs(
            efficiency=self.efficiency,
            tables=self.tables,
            scales=(*self.scales, Scale(module, part, quantity, factor)),
            transfer_seconds=self.transfer_seconds,
            static_bytes=self.static_bytes,
            memory_limit=self.memory_limit,
            device=self.device,
        )

    @staticmethod
    def load(path: str | Path) -> Costs:
        """Read a costs file (docs/cost-model.md). Raises ConfigurationError: file, place and reason on one line."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{path}: line {error.lineno}: not JSON ({error.msg})") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path}: file: {getattr(error, 'strerror', None) or error}") from error
        return _to_costs(validate(str(path), _upgraded(data), _File))

    def save(self, path: str | Path) -> None:
        """Write a costs file that :meth:`load` gives back equal."""
        measured: dict[tuple[str, str, str, tuple[float, ...]], dict[str, object]] = {}
        for t in self.tables:
            entry = measured.setdefault(
                (t.module, t.part, t.strategy, t.tokens),
                {"module": t.module, "part": t.part, "strategy": t.strategy, "tokens": list(t.tokens)},
            )
            entry[t.quantity] = list(t.values)
        data = {
            "version": 2,
            "device": self.device,
            "efficiency": {name: [list(p) for p in curve] for name, curve in self.efficiency},
            "measured": list(measured.values()),
            "scale": [vars(s) for s in self.scales],
            "transfer_seconds": self.transfer_seconds,
            "static_bytes": list(self.static_bytes),
            "memory_limit": self.memory_limit,
        }
        Path(path).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Measured(_Strict):
    module: str
    part: Part
    strategy: str = "none"
    tokens: Annotated[list[PositiveFloat], Field(min_length=1)]
    forward: list[NonNegativeFloat] | None = None
    backward: list[NonNegativeFloat] | None = None
    weight: list[NonNegativeFloat] | None = None
    activation: list[NonNegativeFloat] | None = None
    deferred_activation: list[NonNegativeFloat] | None = None

    @model_validator(mode="after")
    def _aligned(self) -> _Measured:
        if any(b <= a for a, b in pairwise(self.tokens)):
            raise ValueError(f"tokens must rise, got {self.tokens}")
        if self.strategy not in strategy_names():
            raise ValueError(f"strategy: {self.strategy!r} is not one of {', '.join(strategy_names())}")
        if self.strategy != "none" and self.part != "layer":
            raise ValueError(f"strategy: a {self.part} has none, only a layer has")
        for q in QUANTITIES:
            values = getattr(self, q)
            if values is not None and self.strategy != "none" and q not in STRATEGY_QUANTITIES:
                raise ValueError(f"{q}: is the same under every strategy, measure it under none")
            if values is not None and len(values) != len(self.tokens):
                raise ValueError(f"{q} has {len(values)} values for {len(self.tokens)} sizes")
        return self


class _Scale(_Strict):
    module: str = "*"
    part: Literal["stem", "layer", "head", "stage", "*"] = "*"
    quantity: Literal["forward", "backward", "weight", "activation", "deferred_activation", "*"] = "*"
    factor: PositiveFloat


class _File(_Strict):
    version: Literal[2]
    device: str = ""
    efficiency: dict[Operator, Annotated[list[tuple[PositiveFloat, PositiveFloat]], Field(min_length=1)]] = Field(
        default_factory=dict
    )
    measured: list[_Measured] = Field(default_factory=list)
    scale: list[_Scale] = Field(default_factory=list)
    transfer_seconds: NonNegativeFloat | None = None
    static_bytes: list[NonNegativeFloat] = Field(default_factory=list)
    memory_limit: PositiveFloat | None = None

    @model_validator(mode="after")
    def _curves(self) -> _File:
        for name, points in self.efficiency.items():
            check_curve(name, points)
        return self


def _upgraded(data: Any) -> Any:
    """A file of version 1, which called ``deferred_activation`` ``hold`` and ``transfer_seconds`` ``hop_seconds``."""
    if not is_version(data, 1):
        return data
    new = renamed(data, {"hop_seconds": "transfer_seconds"}) | {"version": 2}
    if "measured" in new:
        new["measured"] = renamed(new["measured"], {"hold": "deferred_activation"})
    for scale in new["scale"] if isinstance(new.get("scale"), list) else ():
        if isinstance(scale, dict) and scale.get("quantity") == "hold":
            scale["quantity"] = "deferred_activation"
    return new


def _to_costs(data: _File) -> Costs:
    tables = tuple(
        Table(m.module, m.part, q, tuple(m.tokens), tuple(getattr(m, q)), m.strategy)
        for m in data.measured
        for q in QUANTITIES
        if getattr(m, q) is not None
    )
    return Costs(
        efficiency=tuple(sorted((k, check_curve(k, v)) for k, v in data.efficiency.items())),
        tables=tables,
        scales=tuple(Scale(s.module, s.part, s.quantity, s.factor) for s in data.scale),
        transfer_seconds=data.transfer_seconds,
        static_bytes=tuple(data.static_bytes),
        memory_limit=data.memory_limit,
        device=data.device,
    )
