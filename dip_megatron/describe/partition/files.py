"""Partition files: YAML, one mapping per module."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from ..files import ConfigurationError, read_yaml, training_file
from ..model import ModelError, ModulePartition, MultimodalModel, Partition


class _Module(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    unit_size: PositiveInt | None
    layers: Annotated[list[Annotated[list[NonNegativeInt], Field(min_length=1)]], Field(min_length=1)]
    replicated: bool = False


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    modules: Annotated[dict[str, _Module], Field(min_length=1)]
    reasons: list[str] = Field(default_factory=list)


def write_partition(path: str | Path, partition: Partition) -> None:
    """Write a partition so that :func:`read_partition` gives exactly it back, reasons included."""
    modules = {
        m.module: {"unit_size": m.unit_size, "layers": [list(row) for row in m.layers]}
        | ({"replicated": True} if m.replicated else {})
        for m in partition.modules
    }
    data = {"modules": modules, "reasons": list(partition.reasons)}
    Path(path).write_text(
        yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True), encoding="utf-8"
    )


def read_partition(path: str | Path, model: MultimodalModel | None = None) -> Partition:
    """Read a partition from a file or a shipped recipe (by name), checked against ``model`` if one is given. Raises
    ConfigurationError: file, place, reason."""
    path = training_file(path, "partition.yaml")
    data = read_yaml(path, _File)
    try:
        partition = Partition(
            tuple(
                ModulePartition(name, tuple(tuple(row) for row in m.layers), m.unit_size, m.replicated)
                for name, m in data.modules.items()
            ),
            tuple(data.reasons),
        )
        if model is not None:
            partition.check(model)
    except ModelError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    return partition
