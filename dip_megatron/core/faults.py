"""Messages about faults in files of settings or plans, for the person who wrote the file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The name in ``known`` of which ``name`` is probably a misspelling. None if there is none, or if ``name`` is
    known."""
    known = list(known)
    return None if name in known else next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), None)


def reason(fault: Any, schema: type[BaseModel]) -> str:
    """A one-line message for one of pydantic's ``errors()`` about ``schema``. For an unknown key it suggests the likely
    one, or lists all."""
    if fault["type"] == "extra_forbidden":
        keys = _keys(schema, fault["loc"][:-1])
        meant = nearest(str(fault["loc"][-1]), keys)
        return f"no such key; did you mean {meant}?" if meant else f"no such key; there are {', '.join(keys)}"
    message = " ".join(str(fault["msg"]).removeprefix("Value error, ").split())
    value = fault.get("input")
    if fault["type"].startswith(("missing", "value_error")) or not isinstance(value, str | int | float | None):
        return message
    text = json.dumps(value)
    return f"{message}, got {text}" if len(text) <= 60 else message


def _keys(schema: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys, as written in files, of the model at ``location`` in ``schema``."""
    models = [schema]
    for part in location:
        found = [inner for model in models if part in model.model_fields for inner in _models(model, str(part))]
        models = found or models  # an index, the key of a mapping or the tag of a union stays in the same model
    return list(dict.fromkeys(field.alias or name for m in models for name, field in m.model_fields.items()))


def _models(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """The models that a field's type contains."""
    waiting, found = [model.model_fields[name].annotation], []
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        waiting += get_args(annotation)
    return found
