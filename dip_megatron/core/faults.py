"""What is wrong with a file of settings or plans, in words for whoever wrote it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``name`` is likely a misspelling of; None if there is none, or it is known."""
    known = list(known)
    return None if name in known else next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), None)


def reason(fault: Any, schema: type[BaseModel]) -> str:
    """The reason of one of pydantic's ``errors()`` about ``schema``, on one line; of a key that isn't known with the
    likely one, or with all there are."""
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
    """The keys of the model at a place of ``schema``, under which they are written."""
    models = [schema]
    for part in location:
        found = [inner for model in models if part in model.model_fields for inner in _models(model, str(part))]
        models = found or models  # an index, the key of a mapping, or the tag of a union: the same model still
    return list(dict.fromkeys(field.alias or name for m in models for name, field in m.model_fields.items()))


def _models(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """The models within a field's type."""
    waiting, found = [model.model_fields[name].annotation], []
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        waiting += get_args(annotation)
    return found
